// A simulated accelerator for tests: it computes on the CPU, and behaves like a GPU.
//
// The properties of a GPU that matter to this library are kept:
//   * its memory cannot be read from the host: addresses are not canonical, so that a
//     read which goes around torch ends the process;
//   * backward passes run in a thread of the device;
//   * it has a random generator of its own;
//   * a copy to pinned memory with non_blocking=True arrives later, and the host memory
//     holds noise until then;
//   * on request it has no float64, as Apple's MPS.
// Each wait of the host for the device is counted, by kind.
//
// Operators run on the CPU by torch's own fallback, so results equal those of the CPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

const Device kDevice(DeviceType::PrivateUse1, 0);
constexpr uintptr_t kAway = uintptr_t(1) << 60;  // makes addresses not canonical
constexpr int64_t kLag = 40;  // operators until an asynchronous copy has arrived

// ---- what is counted ------------------------------------------------------------

enum Kind { kToHost, kToHostLater, kToDevice, kScalar, kShape, kSynchronize, kKinds };

struct LateCopy {
  int64_t due;
  Tensor source, destination;
};

struct State {
  std::recursive_mutex mutex;
  int64_t counts[kKinds] = {};
  int64_t operators = 0;
  bool refuses_float64 = false;
  bool refuses_waits = false;
  std::deque<LateCopy> late;
};

State& state() {
  static State* one = new State;  // outlives static tensors
  return *one;
}

thread_local int inside = 0;  // an operator runs: its own copies are not counted

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void deliver(bool all) {
  auto& s = state();
  std::lock_guard<std::recursive_mutex> lock(s.mutex);
  while (!s.late.empty() && (all || s.late.front().due <= s.operators)) {
    auto copy = s.late.front();
    s.late.pop_front();
    copy.destination.copy_(copy.source);
  }
}

void count(Kind kind, const std::string& what) {
  if (inside) return;
  auto& s = state();
  std::lock_guard<std::recursive_mutex> lock(s.mutex);
  const bool waits = kind != kToHostLater && kind != kToDevice;
  TORCH_CHECK(
      !(waits && s.refuses_waits), "The host would wait for the device here: ", what);
  ++s.counts[kind];
  if (waits) deliver(true);
}

// ---- memory ---------------------------------------------------------------------

void* away(void* host) {
  return host ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | kAway)
              : nullptr;
}

void* host_of(const void* device) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(device) & ~kAway);
}

void release(void* host) { std::free(host); }

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* host = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    return {away(host), host, &release, kDevice};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(host_of(to), host_of(from), size);
  }
};

DeviceAllocator device_memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &device_memory);

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;

void unpin(void* host) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(host));
  }
  std::free(host);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const size_t whole = (size + 63) / 64 * 64;
    void* host = size ? std::aligned_alloc(64, whole) : nullptr;
    if (host) {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned[reinterpret_cast<uintptr_t>(host)] = whole;
    }
    return {host, host, &unpin, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

PinnedAllocator pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto next = pinned.upper_bound(address);
  if (next == pinned.begin()) return false;
  --next;
  return address < next->first + next->second;
}

// ---- random numbers -------------------------------------------------------------

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit DeviceGenerator(at::Generator twin)
      : c10::GeneratorImpl(
            kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(std::move(twin)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offsets here"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offsets here"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override {
    return host.unsafeGetGeneratorImpl()->seed();
  }
  void set_state(const c10::TensorImpl& next) override {
    host.unsafeGetGeneratorImpl()->set_state(next);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    return new DeviceGenerator(host.clone());
  }
};

at::Generator new_generator(uint64_t seed) {
  return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator(seed));
}

const at::Generator& default_generator() {
  static auto* one = new at::Generator(new_generator(0x5eed));
  return *one;
}

// ---- device, streams, events ----------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::PrivateUse1;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(
      void** event, const c10::Stream&, const DeviceIndex,
      const c10::EventFlag) const override {
    if (!*event) *event = new int64_t;
    *static_cast<int64_t*>(*event) = state().operators + kLag;
  }
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<int64_t*>(event);
  }
  bool queryEvent(void* event) const override {
    deliver(false);
    return !event || *static_cast<int64_t*>(event) <= state().operators;
  }
  void synchronizeEvent(void* event) const override {
    if (!queryEvent(event)) count(kSynchronize, "an event");
  }
  bool queryStream(const c10::Stream&) const override { return state().late.empty(); }
  void synchronizeStream(const c10::Stream&) const override {
    count(kSynchronize, "a stream");
  }
  void synchronizeDevice(const DeviceIndex) const override {
    count(kSynchronize, "the device");
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return new_generator(c10::default_rng_seed_val);
  }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(
      const c10::Storage& storage, size_t size) const override {
    auto next = device_memory.allocate(size);
    std::memcpy(
        host_of(next.get()), host_of(storage.data()), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(next));
    storage.set_nbytes(size);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---- operators ------------------------------------------------------------------

Tensor on_host(const Tensor& tensor) {  // the same memory
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(
      host_of(tensor.unsafeGetTensorImpl()->data()), tensor.sizes(), tensor.strides(),
      at::TensorOptions(tensor.scalar_type()));
}

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      !(state().refuses_float64 && dtype == at::kDouble),
      "This device has no float64. Use float32 instead.");
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype),
      format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (source.numel() == 0) return target;
  const bool leaves = !source.is_cpu() && target.is_cpu();
  const bool later = leaves && non_blocking && !inside && is_pinned(target.data_ptr());
  if (leaves) count(later ? kToHostLater : kToHost, "a copy to the host");
  if (source.is_cpu()) count(kToDevice, "a copy to the device");
  Inside guard;
  if (!later) {
    on_host(target).copy_(on_host(source));
    return target;
  }
  auto& s = state();
  std::lock_guard<std::recursive_mutex> lock(s.mutex);
  std::memset(target.data_ptr(), 0xA5, target.nbytes());
  s.late.push_back({s.operators + kLag, on_host(source).clone(), target});
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (source.sizes() != target.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

const Tensor& resize(
    const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes =
      (self.storage_offset() + self.numel()) * self.dtype().itemsize();
  if (bytes > self.storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  }
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  count(kScalar, "the value of a tensor");
  Inside guard;
  return at::_local_scalar_dense(on_host(self));
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::make_optional(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(
    Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(
      self, source, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  Inside guard;
  std::optional<Tensor> shift;
  if (bias && bias->defined()) shift = on_host(*bias);
  return at::convolution_symint(
             on_host(input), on_host(weight), shift, stride, padding, dilation,
             transposed, output_padding, groups)
      .to(kDevice);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  Inside guard;
  std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups
                                           : weight.sym_size(0)};
  auto [x, w, b] = at::convolution_backward_symint(
      on_host(grad), on_host(input), on_host(weight), c10::SymIntArrayRef(bias), stride,
      padding, dilation, transposed, output_padding, groups, mask);
  const auto sent = [](const Tensor& t) { return t.defined() ? t.to(kDevice) : t; };
  return {sent(x), sent(w), sent(b)};
}

// Operators whose result decides a shape or a branch on the host.
const std::set<std::string> kDecide = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::_unique", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave"};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  if (kDecide.count(op.schema().name())) count(kShape, op.schema().name());
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const auto* optional = arguments[i].type()->castRaw<c10::OptionalType>();
    const bool is_default = value.isNone() && optional &&
        optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
    if (!is_default && !value.isGenerator()) continue;
    const auto generator = is_default ? default_generator() : value.toGenerator();
    if (auto* own = dynamic_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl()))
      value = own->host;
  }
  if (!inside) ++state().operators;
  deliver(false);
  Inside guard;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &at::native::set_);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY(simulated_device, m) {
  m.def("counts() -> int[]", [] {
    return std::vector<int64_t>(state().counts, state().counts + kKinds);
  });
  m.def("refuse_float64(bool yes) -> ()", [](bool yes) {
    state().refuses_float64 = yes;
  });
  m.def("refuse_waits(bool yes) -> ()", [](bool yes) { state().refuses_waits = yes; });
  m.def("rng_state() -> Tensor", [] { return default_generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& next) {
    auto generator = default_generator();
    generator.set_state(next);
  });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    auto generator = default_generator();
    generator.set_current_seed(seed);
  });
}
