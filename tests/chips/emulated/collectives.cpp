// The device's collectives: Gloo's, over the same bytes, under the name of the vendor's library. A tensor of the host is
// refused, and so is a reduction that only NCCL has (Gloo refuses it, as HCCL does).
#include "device.h"

#include <pybind11/stl.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>

namespace emulated {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Lists = std::vector<Tensors>;
using Work = c10::intrusive_ptr<c10d::Work>;

namespace {

Tensor host(const Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == kDevice, "a collective of the device got a tensor on ", tensor.device());
  return on_host(tensor);
}
Tensors host(const Tensors& tensors) {
  Tensors out;
  for (const auto& tensor : tensors) out.push_back(host(tensor));
  return out;
}
Lists host(const Lists& lists) {
  Lists out;
  for (const auto& tensors : lists) out.push_back(host(tensors));
  return out;
}

struct Done final : c10d::Work {  // of a collective that was dropped
  bool isCompleted() override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(c10::IValue(c10::List<Tensor>()));
    return future;
  }
};

// Plays the fault of this call; true: the collective is dropped.
bool dropped(const char* name) {
  const Fault* fault = fault_of(name);
  if (!fault) return false;
  TORCH_CHECK(fault->kind != "raise", "the emulated device has no collective ", name);
  if (fault->kind == "slow") take(fault->amount);
  if (fault->kind == "die") std::_Exit(9);
  return fault->kind == "drop";
}

struct Collectives final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> inner;
  std::string name;

  Collectives(c10::intrusive_ptr<c10d::Backend> gloo, std::string called)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), inner(std::move(gloo)), name(std::move(called)) {}
  const std::string getBackendName() const override { return name; }
  bool supportsCoalescing() const override { return false; }

#define RUN(NAME, CALL) \
  if (dropped(#NAME)) return c10::make_intrusive<Done>(); \
  return inner->CALL

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto own = host(tensors);
    RUN(broadcast, broadcast(own, options));
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto own = host(tensors);
    RUN(all_reduce, allreduce(own, options));
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto own = host(tensors);
    RUN(reduce, reduce(own, options));
  }
  Work allgather(Lists& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    RUN(all_gather, allgather(to, from, options));
  }
  Work _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out), from = host(in);
    RUN(all_gather, _allgather_base(to, from, options));
  }
  Work reduce_scatter(Tensors& out, Lists& in, const c10d::ReduceScatterOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    RUN(reduce_scatter, reduce_scatter(to, from, options));
  }
  Work _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& options) override {
    auto to = host(out), from = host(in);
    RUN(reduce_scatter, _reduce_scatter_base(to, from, options));
  }
  Work allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto to = host(out), from = host(in);
    RUN(all_gather, allgather_into_tensor_coalesced(to, from, options));
  }
  Work reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& options) override {
    auto to = host(out), from = host(in);
    RUN(reduce_scatter, reduce_scatter_tensor_coalesced(to, from, options));
  }
  Work alltoall_base(
      Tensor& out, Tensor& in, std::vector<int64_t>& out_sizes, std::vector<int64_t>& in_sizes,
      const c10d::AllToAllOptions& options) override {
    auto to = host(out), from = host(in);
    RUN(all_to_all, alltoall_base(to, from, out_sizes, in_sizes, options));
  }
  Work gather(Lists& out, Tensors& in, const c10d::GatherOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    RUN(gather, gather(to, from, options));
  }
  Work scatter(Tensors& out, Lists& in, const c10d::ScatterOptions& options) override {
    auto to = host(out);
    auto from = host(in);
    RUN(scatter, scatter(to, from, options));
  }
  Work send(Tensors& tensors, int to, int tag) override {
    auto own = host(tensors);
    RUN(send, send(own, to, tag));
  }
  Work recv(Tensors& tensors, int from, int tag) override {
    auto own = host(tensors);
    RUN(recv, recv(own, from, tag));
  }
  Work barrier(const c10d::BarrierOptions&) override {
    c10d::BarrierOptions none;  // those given name a device that Gloo does not know
    RUN(barrier, barrier(none));
  }
#undef RUN
  void setSequenceNumberForGroup() override { inner->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner->getSequenceNumberForGroup(); }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", &start);
  m.def("current_device", &current_device);
  m.def("set_current_device", &set_current_device);
  m.def("plant", [](const std::vector<std::tuple<std::string, std::string, double, int64_t, int64_t>>& planted) {
    std::vector<Fault> faults;
    for (const auto& [operation, kind, amount, first, last] : planted)
      faults.push_back({operation, kind, amount, first, last});
    plant(std::move(faults));
  });
  m.def("collectives", [](c10::intrusive_ptr<c10d::Backend> gloo, std::string name) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Collectives>(std::move(gloo), std::move(name));
  });
  m.def("counts", [] {
    std::lock_guard<std::mutex> hold(counts_lock);
    return std::make_tuple(counts.waits, counts.live, counts.peak);
  });
  m.def("reset", [] {
    std::lock_guard<std::mutex> hold(counts_lock);
    counts.waits = 0;
    counts.peak = counts.live;
  });
}

}  // namespace emulated
