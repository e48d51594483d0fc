// A CUDA device for a PyTorch without CUDA: its memory is the CPU's, and so are its operations.
//
// A tensor of this device has the dispatch key CUDA, and storage that the CPU can read. The fallback
// of that key runs an operation on CPU tensors that share this storage, and gives its results back
// as tensors of the device: views of what was given where they are, what was written in place itself.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <set>
#include <unordered_map>

namespace {

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);
const c10::DispatchKeySet kOurs(c10::DispatchKey::CUDA);
const c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

// One device, one stream, nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

 private:
  static Stream stream() { return Stream(Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// PyTorch asks for hooks of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(DeviceType::CPU);
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

// New memory holds NaN in every floating-point dtype.
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = nullptr;
    if (bytes != 0) {
      if (posix_memalign(&address, 512, bytes) != 0) throw std::bad_alloc();
      memset(address, 0xFF, bytes);
    }
    return {address, address, &free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
const bool registered = [] {
  c10::SetAllocator(DeviceType::CUDA, &memory, 100);
  return true;
}();

// The tensors of one operation, on the CPU and on the device: equal storage on one side is equal on
// the other.
class Images {
 public:
  Tensor on_cpu(const Tensor& t) {
    const c10::Storage ours = t.storage();
    auto found = cpu_.find(ours.unsafeGetStorageImpl());
    if (found == cpu_.end()) {
      c10::DataPtr data(ours.mutable_data(), nullptr, [](void*) {}, Device(DeviceType::CPU));
      const auto cpu = storage(ours.nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU));
      found = cpu_.emplace(ours.unsafeGetStorageImpl(), cpu).first;
      device_.emplace(cpu.unsafeGetStorageImpl(), ours);
      if (!t.is_inference()) ordinary_.insert(cpu.unsafeGetStorageImpl());
    }
    return laid_out(t, found->second, kCpu);
  }

  Tensor on_device(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu() || t.layout() != at::kStrided) return t;
    auto* impl = t.storage().unsafeGetStorageImpl();
    auto found = device_.find(impl);
    if (found == device_.end()) {
      const auto ours = storage(t.storage().nbytes(), owning(t.storage()), &memory);
      found = device_.emplace(impl, ours).first;
    }
    // In inference mode a view of an ordinary tensor is an ordinary one.
    c10::InferenceMode mode(c10::InferenceMode::is_enabled() && ordinary_.count(impl) == 0);
    return laid_out(t, found->second, kOurs);
  }

  // What an operation resized in place.
  static void take_over(const Tensor& ours, const Tensor& cpu) {
    if (cpu.storage().data() != ours.storage().data()) {
      auto& target = ours.unsafeGetTensorImpl()->unsafe_storage();
      target.set_data_ptr_noswap(owning(cpu.storage()));
      target.set_nbytes(cpu.storage().nbytes());
    }
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(
        cpu.sym_sizes(), cpu.sym_strides(), cpu.sym_storage_offset());
  }

 private:
  static c10::Storage storage(size_t bytes, c10::DataPtr data, c10::Allocator* allocator) {
    return {c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator, true};
  }

  static c10::DataPtr owning(const c10::Storage& cpu) {
    auto* keep = new c10::Storage(cpu);
    return {cpu.mutable_data(), keep, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
            kDevice};
  }

  static Tensor laid_out(const Tensor& like, c10::Storage in, c10::DispatchKeySet keys) {
    auto t = at::detail::make_tensor<c10::TensorImpl>(std::move(in), keys, like.dtype());
    auto* impl = t.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(like.sym_sizes(), like.sym_strides(), like.sym_storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (like.is_conj()) t._set_conj(true);
    if (like.is_neg()) t._set_neg(true);
    return t;
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_, device_;
  std::set<c10::StorageImpl*> ordinary_;
};

// Operations that take indices, or the source of a copy, on the CPU.
const std::set<std::string> kTakesBoth{"aten::index", "aten::index_put", "aten::index_put_",
                                       "aten::_index_put_impl_", "aten::is_set_to"};

void as_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto given = torch::jit::pop(*stack, schema.arguments().size());
  Images images;
  std::vector<std::pair<Tensor, Tensor>> pairs;
  bool ours = false, cpu = false;
  const auto image = [&](const Tensor& t) -> Tensor {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      cpu = cpu || (t.is_cpu() && t.dim() > 0);
      return t;
    }
    ours = true;
    pairs.emplace_back(t, images.on_cpu(t));
    return pairs.back().second;
  };
  for (const IValue& value : given) {
    if (value.isTensor()) {
      torch::jit::push(*stack, image(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(image(t));
      torch::jit::push(*stack, list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(image(*t)) : t);
      torch::jit::push(*stack, list);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      ours = true;
      torch::jit::push(*stack, Device(DeviceType::CPU));
    } else {
      torch::jit::push(*stack, value);
    }
  }
  const auto& name = op.operator_name().name;
  TORCH_CHECK(!(ours && cpu) || kTakesBoth.count(name) != 0,
              "Expected all tensors to be on the same device, but ", name,
              " got some on cuda:0 and some on cpu");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  const auto results = torch::jit::pop(*stack, schema.returns().size());
  for (const auto& [device, image] : pairs)
    if (image.sizes() != device.sizes() || image.strides() != device.strides() ||
        image.storage().data() != device.storage().data())
      Images::take_over(device, image);
  const auto back = [&](const Tensor& t) -> Tensor {
    for (const auto& [device, image] : pairs)
      if (image.is_same(t)) return device;
    return ours ? images.on_device(t) : t;
  };
  for (const IValue& value : results) {
    if (value.isTensor()) {
      torch::jit::push(*stack, back(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(back(t));
      torch::jit::push(*stack, list);
    } else {
      torch::jit::push(*stack, value);
    }
  }
}

Tensor make_empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                  std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
                  std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic_symint(size, &memory, kOurs, at::dtype_or_default(dtype), format);
}

Tensor make_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                    std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_symint_generic(size, stride, &memory, kOurs,
                                                  at::dtype_or_default(dtype));
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  Images images;
  const auto image = [&](const Tensor& t) { return t.is_cuda() ? images.on_cpu(t) : t; };
  at::AutoDispatchBelowADInplaceOrView below;
  image(to).copy_(image(from));
  return to;
}

at::Scalar number(const Tensor& t) {
  Images images;
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(images.on_cpu(t));
}

Tensor& set_part(Tensor& t, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                 c10::SymIntArrayRef stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride, offset);
  return t;
}

Tensor& set_whole(Tensor& t, c10::Storage storage) {
  const c10::SymInt size = storage.nbytes() / t.itemsize(), stride = 1;
  return set_part(t, std::move(storage), 0, {&size, 1}, {&stride, 1});
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&as_on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", make_empty);
  library.impl("empty_strided", make_strided);
  library.impl("copy_", copy);
  library.impl("_local_scalar_dense", number);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_.source_Storage_storage_offset", set_part);
}
