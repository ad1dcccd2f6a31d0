// An accelerator that does not exist: a PrivateUse1 device whose memory is host memory and whose operations run on the
// CPU's kernels, over aliases of the same bytes. Its numbers are the CPU's, bit for bit; what it finds is code that
// forgets which device it is on. It counts what the host waits for, and faults can be planted in it.
//
// Not emulated: asynchronous streams, a generator of its own (it draws from the CPU's), pinned memory.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

namespace emulated {

using at::Tensor;
using Stack = torch::jit::Stack;

Counts counts;
std::mutex counts_lock;

namespace {

thread_local c10::DeviceIndex current = 0;
c10::DeviceIndex devices = 1;
int64_t capacity = 0;  // bytes of one device

void count_wait() {
  std::lock_guard<std::mutex> hold(counts_lock);
  counts.waits++;
}

void account(int64_t bytes) {
  std::lock_guard<std::mutex> hold(counts_lock);
  counts.live += bytes;
  counts.peak = std::max(counts.peak, counts.live);
}

// ---- memory

struct Block {
  void* start;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  account(-static_cast<int64_t>(block->bytes));
  std::free(block->start);
  delete block;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t asked) override {
    const size_t bytes = (std::max<size_t>(asked, 1) + 511) / 512 * 512;
    TORCH_CHECK(
        counts.live + static_cast<int64_t>(bytes) <= capacity,
        "the emulated device is out of memory: ", counts.live, " bytes used, ", bytes, " more asked for, it has ", capacity);
    void* start = nullptr;
    TORCH_CHECK(posix_memalign(&start, 512, bytes) == 0, "out of host memory");
    std::memset(start, 0xFF, bytes);  // nan in every floating type: what is read before it is written shows
    account(bytes);
    return {start, new Block{start, bytes}, &release, c10::Device(kDevice, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* of : {&stats.allocated_bytes[0], &stats.reserved_bytes[0]}) {
      of->current = counts.live;
      of->peak = counts.peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { counts.peak = counts.live; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {static_cast<size_t>(capacity - counts.live), static_cast<size_t>(capacity)};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// ---- devices, streams, events: one stream, on which everything is done when a call returns

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current;
    setDevice(device);
    return {kDevice, before};
  }
  c10::Device getDevice() const override { return {kDevice, current}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }

  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new double;
    *static_cast<double*>(*event) = now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    return 1e3 * (*static_cast<double*>(to) - *static_cast<double*>(from));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return devices > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device >= 0 ? exchangeDevice(device) : current;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* inside = storage.unsafeGetStorageImpl();
    c10::DataPtr larger = allocator.allocate(bytes);
    if (inside->data()) std::memcpy(larger.get(), inside->data(), std::min(bytes, inside->nbytes()));
    inside->set_data_ptr_noswap(std::move(larger));
    inside->set_nbytes(bytes);
  }
};

// ---- tensors that share bytes across the border

Tensor with_storage(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  out.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  return out;
}

// A fresh CPU result as a device tensor, without a copy.
Tensor adopt(const Tensor& host, c10::DeviceIndex device) {
  auto* kept = new c10::Storage(host.storage());
  account(kept->nbytes());
  auto drop = [](void* context) {
    auto* storage = static_cast<c10::Storage*>(context);
    account(-static_cast<int64_t>(storage->nbytes()));
    delete storage;
  };
  c10::DataPtr bytes(kept->mutable_data(), kept, drop, c10::Device(kDevice, device));
  c10::Storage storage(c10::Storage::use_byte_size_t(), kept->nbytes(), std::move(bytes), &allocator, true);
  return with_storage(std::move(storage), host, c10::DispatchKey::PrivateUse1);
}

// ---- planted faults

std::vector<Fault> faults;
std::map<std::string, int64_t> calls;

}  // namespace

void take(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

const Fault* fault_of(const std::string& name) {
  std::lock_guard<std::mutex> hold(counts_lock);
  if (faults.empty()) return nullptr;
  const int64_t call = calls[name]++;
  for (const auto& fault : faults)
    if (fault.operation == name && fault.first <= call && call < fault.last) return &fault;
  return nullptr;
}

Tensor on_host(const Tensor& tensor) {
  auto* kept = new c10::Storage(tensor.storage());
  auto drop = [](void* context) { delete static_cast<c10::Storage*>(context); };
  c10::DataPtr bytes(kept->mutable_data(), kept, drop, c10::Device(c10::kCPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(bytes), c10::GetAllocator(c10::kCPU), true);
  auto out = with_storage(std::move(storage), tensor, c10::DispatchKey::CPU);
  if (tensor.is_conj()) out._set_conj(true);
  if (tensor.is_neg()) out._set_neg(true);
  return out;
}

namespace {

// Spoils what an operation wrote. `host` shares its bytes with the result.
void spoil(const Tensor& host, const Fault& fault) {
  if (!host.defined() || !host.is_floating_point() || !host.numel()) return;
  if (fault.kind == "scale") host.mul_(1 + fault.amount);
  if (fault.kind == "saturate") host.copy_(at::nan_to_num(host));  // inf to the largest number, nan to zero
  if (fault.kind == "round") {  // keeps `amount` bits of each mantissa, by cutting
    const auto bits = static_cast<int>(fault.amount);
    auto [mantissa, exponent] = at::frexp(host.to(at::kDouble));
    host.copy_(at::ldexp(mantissa.mul(std::ldexp(1.0, bits)).trunc().mul(std::ldexp(1.0, -bits)), exponent));
  }
}

// ---- every operation that has no kernel of its own below

struct Border {
  const c10::OperatorHandle& operation;
  c10::DeviceIndex device = -1;
  std::vector<std::pair<Tensor, Tensor>> aliased;  // the device's, the host's

  Tensor enter(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kDevice) {
      TORCH_CHECK(
          tensor.dim() == 0, operation.operator_name(), ": expected all tensors on the device, got one of shape ",
          tensor.sizes(), " on ", tensor.device());
      return tensor;  // torch takes a 0-d tensor of the host for a number
    }
    TORCH_CHECK(
        device < 0 || device == tensor.device().index() || tensor.dim() == 0, operation.operator_name(),
        ": tensors on two devices, ", static_cast<int>(device), " and ", tensor.device());
    if (device < 0) device = tensor.device().index();
    aliased.emplace_back(tensor, on_host(tensor));
    return aliased.back().second;
  }

  Tensor leave(const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() == kDevice) return tensor;
    for (const auto& [own, host] : aliased)
      if (host.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return own;
    for (const auto& [own, host] : aliased)
      if (host.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl())
        return with_storage(own.storage(), tensor, c10::DispatchKey::PrivateUse1);
    return adopt(tensor, device);
  }

  // out= variants may have given their argument another size, or other bytes.
  void settle() {
    for (auto& [own, host] : aliased) {
      auto* inside = own.unsafeGetTensorImpl();
      if (own.sizes() != host.sizes()) inside->set_sizes_and_strides(host.sizes(), host.strides());
      if (own.storage().data() != host.storage().data()) inside->set_storage_keep_dtype(adopt(host, device).storage());
    }
  }
};

template <typename Change>
void change_tensors(c10::IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    value = changed;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const auto& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    value = changed;
  }
}

void on_the_cpus_kernel(const c10::OperatorHandle& operation, Stack* stack) {
  const auto& schema = operation.schema();
  const std::string name = operation.operator_name().name;
  const Fault* fault = fault_of(name);
  TORCH_CHECK(!fault || fault->kind != "raise", "the emulated device has no kernel for ", name);

  Border border{operation};
  const size_t arguments = stack->size() - schema.arguments().size();
  for (size_t i = arguments; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    change_tensors(value, [&](const Tensor& tensor) { return border.enter(tensor); });
    if (value.isDevice() && value.toDevice().type() == kDevice) {
      border.device = value.toDevice().has_index() ? value.toDevice().index() : current;
      value = c10::Device(c10::kCPU);
    }
  }
  if (border.device < 0) border.device = current;
  operation.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  border.settle();
  bool wrote = false;
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    change_tensors((*stack)[i], [&](const Tensor& tensor) {
      if (fault) spoil(tensor, *fault);
      wrote = true;
      return border.leave(tensor);
    });
  }
  if (fault && !wrote && !border.aliased.empty()) spoil(border.aliased.front().second, *fault);  // a list, in place
}

// ---- what the CPU's kernels cannot do: make, view and copy tensors of this device

struct On {  // makes `device` the current one for a moment
  c10::DeviceIndex before = current;
  explicit On(std::optional<at::Device> device) {
    if (device && device->has_index()) current = device->index();
  }
  ~On() { current = before; }
};

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(device);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  On on(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool from_here = from.device().type() == kDevice, to_here = to.device().type() == kDevice;
  if (from_here && !to_here) count_wait();
  (to_here ? on_host(to) : to).copy_(from_here ? on_host(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  count_wait();
  return on_host(tensor).item();
}

Tensor as_strided(
    const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype());
  auto* inside = out.unsafeGetTensorImpl();
  inside->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  inside->set_storage_offset(offset ? offset->guard_int(__FILE__, __LINE__) : tensor.storage_offset());
  return out;
}

const Tensor& resize_(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  if (needed > tensor.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), needed);
  return tensor;
}

Tensor& set_strided(Tensor& out, c10::Storage from, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* inside = out.unsafeGetTensorImpl();
  inside->set_storage_keep_dtype(std::move(from));
  inside->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  inside->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  return out;
}

Tensor& set_storage(Tensor& out, c10::Storage from) {
  const int64_t length = from.nbytes() / out.itemsize();
  auto* inside = out.unsafeGetTensorImpl();
  inside->set_storage_keep_dtype(std::move(from));
  inside->set_storage_offset(0);
  inside->set_sizes_contiguous({length});
  return out;
}

Tensor& set_tensor(Tensor& out, const Tensor& from) {
  auto* inside = out.unsafeGetTensorImpl();
  inside->set_storage_keep_dtype(from.storage());
  inside->set_sizes_and_strides(from.sizes(), from.strides());
  inside->set_storage_offset(from.storage_offset());
  return out;
}

int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math
}

}  // namespace

void start(int64_t count_of_devices, int64_t bytes) {
  devices = static_cast<c10::DeviceIndex>(count_of_devices);
  capacity = bytes;
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

void plant(std::vector<Fault> planted) {
  std::lock_guard<std::mutex> hold(counts_lock);
  faults = std::move(planted);
  calls.clear();
}

int64_t current_device() { return current; }
void set_current_device(int64_t device) {
  TORCH_CHECK(0 <= device && device < devices, "device ", device, " of ", static_cast<int>(devices));
  current = static_cast<c10::DeviceIndex>(device);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpus_kernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_strided);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_fused_sdp_choice", plain_attention);
  // Torch's formula would stand in for it; every vendor has the kernel.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&on_the_cpus_kernel>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

}  // namespace emulated
