// What the device's parts share.
#pragma once

#include <ATen/ATen.h>

#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace emulated {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// Since the start or the last reset.
struct Counts {
  int64_t waits = 0;  // values and copies that the host asked for
  int64_t live = 0;   // bytes allocated now
  int64_t peak = 0;   // bytes allocated at the most
};
extern Counts counts;
extern std::mutex counts_lock;

// What an operation or a collective does wrong, from its call number `first` up to `last`.
struct Fault {
  std::string operation;  // "aten::mm", or the name of a collective
  std::string kind;       // "scale", "round", "saturate", "raise"; of a collective "drop", "slow", "die"
  double amount;          // the scale's distance from 1, bits kept, or seconds
  int64_t first;
  int64_t last;
};

const Fault* fault_of(const std::string& name);  // counts the call
void take(double seconds);
at::Tensor on_host(const at::Tensor& tensor);  // the same bytes as a CPU tensor

void start(int64_t devices, int64_t bytes);
void plant(std::vector<Fault> faults);
int64_t current_device();
void set_current_device(int64_t device);

}  // namespace emulated
