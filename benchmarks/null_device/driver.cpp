// A CUDA device that computes nothing, for running the host's side of the GPU path on a machine without a GPU.
//
// It has the functions of CUDA's runtime and driver, of cuBLAS and of NCCL that torch and Triton call, over memory of
// the host that nobody touches. Loaded before torch, it makes torch see a GPU, so that the real torch, the real Triton
// and its launchers, real streams, events, captures and the real allocator run. It checks what a driver checks: sizes
// of launches and of shared memory, memory that is there, and what a capture forbids, by CUDA's rules for its three
// modes. A kernel does nothing, but may take time. What is not here returns success and does nothing (`run` makes these
// functions).
//
// A test reads what happened from the file NULL_DEVICE_LOG, and by the functions null_device_*.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

int64_t setting(const char* name, int64_t otherwise) {
  const char* value = getenv(name);
  return value ? atoll(value) : otherwise;
}

// An H100 SXM's figures, as torch and nvidia-smi show them.
const char* const NAME = "NVIDIA H100 80GB HBM3";
constexpr size_t TOTAL_BYTES = 84942979072, CONTEXT_BYTES = 620 << 20, LARGEST_SHARED = 232448;
constexpr size_t ALLOCATION_UNIT = 2 << 20;
const int NUM_SMS = setting("NULL_DEVICE_SMS", 132);
const int NUM_DEVICES = setting("NULL_DEVICE_COUNT", 1);
// Whether somebody computes what kernels would (compute.py): then memory holds true values.
const bool IS_COMPUTED = setting("NULL_DEVICE_COMPUTES", 0);
std::recursive_mutex lock;
int64_t kernel_ns = setting("NULL_DEVICE_KERNEL_NS", 0);  // device time of each kernel

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ll + time.tv_nsec;
}

void wait_until(int64_t moment) {
  for (int64_t left; (left = moment - now()) > 0;) {
    timespec span{left / 1000000000, left % 1000000000};
    nanosleep(&span, nullptr);
  }
}

FILE* const log_file = getenv("NULL_DEVICE_LOG") ? fopen(getenv("NULL_DEVICE_LOG"), "a") : nullptr;
const int64_t start_ns = now();

void note(const char* what, const std::string& detail) {
  if (!log_file) return;
  fprintf(log_file, "%d %.6f %s %s\n", getpid(), (now() - start_ns) / 1e9, what, detail.c_str());
  fflush(log_file);
}

struct Copy {
  void* to;
  const void* from;
  size_t num_bytes;
};

struct Graph {
  size_t num_kernels = 0;
  std::vector<Copy> copies;
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  std::set<Stream*> streams;
  Graph* graph = new Graph;
  bool is_broken = false;
};

// busy_until: when the work launched so far ends, in ns; 0 before the first launch.
struct Stream {
  int64_t busy_until = 0;
  Capture* capture = nullptr;
};

struct Event {
  int64_t moment = 0;
  bool is_recorded = false;
  Capture* capture = nullptr;
};

struct Kernel {
  std::string name;
  size_t most_shared = 48 << 10;  // bytes of dynamic shared memory; more must be asked for
};

Stream default_stream;
std::set<Capture*> captures;
unsigned long long num_captures = 0;
std::map<uintptr_t, size_t> device_memory, pinned_memory;  // bytes from each address
size_t num_allocated = 0, most_allocated = 0;
std::map<const void*, Kernel*> runtime_kernels;  // of the libraries' own, by their host functions
std::map<std::string, int64_t> counts;
int64_t idle_ns = 0, busy_ns = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local int current_device = 0;

using Guard = std::lock_guard<std::recursive_mutex>;

cudaError_t fail(cudaError_t error, const std::string& where) {
  last_error = error;
  note("error", where + " " + std::to_string(error));
  if (log_file) {
    void* frames[24];
    backtrace_symbols_fd(frames, backtrace(frames, 24), fileno(log_file));
  }
  return error;
}

Stream* stream_of(cudaStream_t stream) {
  bool is_default = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return is_default ? &default_stream : reinterpret_cast<Stream*>(stream);
}

// The range that holds an address, or the end.
std::map<uintptr_t, size_t>::iterator range_of(std::map<uintptr_t, size_t>& ranges, const void* address) {
  auto place = reinterpret_cast<uintptr_t>(address);
  auto found = ranges.upper_bound(place);
  if (found == ranges.begin()) return ranges.end();
  --found;
  return place < found->first + found->second ? found : ranges.end();
}

bool is_on_device(const void* address) { return range_of(device_memory, address) != device_memory.end(); }
bool is_pinned(const void* address) { return range_of(pinned_memory, address) != pinned_memory.end(); }

cudaError_t break_captures(cudaError_t error, const std::string& where) {
  for (Capture* capture : captures) capture->is_broken = true;
  return fail(error, where);
}

// Refuses calls that CUDA forbids in this thread while a capture goes on ("potentially unsafe API calls").
cudaError_t check_captures(const char* where) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* capture : captures) {
    bool is_own = pthread_equal(capture->thread, pthread_self());
    bool is_forbidden = is_own ? capture->mode != cudaStreamCaptureModeRelaxed
                               : thread_mode == cudaStreamCaptureModeGlobal && capture->mode == thread_mode;
    if (is_forbidden) return break_captures(cudaErrorStreamCaptureUnsupported, where);
  }
  return cudaSuccess;
}

#define CHECK_CAPTURES(where) \
  if (cudaError_t error = check_captures(where)) return error

void take_time(Stream* stream, int64_t span_ns) {
  int64_t moment = now();
  if (moment > stream->busy_until) {
    if (stream->busy_until) idle_ns += moment - stream->busy_until;
    stream->busy_until = moment;
  }
  stream->busy_until += span_ns;
  busy_ns += span_ns;
}

cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, size_t num_shared, Stream* stream) {
  Guard guard(lock);
  bool is_grid = grid.x && grid.x <= 2147483647u && grid.y && grid.y <= 65535 && grid.z && grid.z <= 65535;
  size_t num_threads = size_t(block.x) * block.y * block.z;
  if (!is_grid || !num_threads || num_threads > 1024) {
    std::string sizes = std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
    return fail(cudaErrorInvalidConfiguration, kernel->name + " grid " + sizes);
  }
  if (num_shared > kernel->most_shared) return fail(cudaErrorInvalidValue, kernel->name + " shared memory");
  counts["launches"]++;
  if (stream->capture) {
    if (stream->capture->is_broken) return fail(cudaErrorStreamCaptureInvalidated, kernel->name);
    stream->capture->graph->num_kernels++;
    return cudaSuccess;
  }
  if (stream == &default_stream)
    for (Capture* capture : captures)
      if (capture->mode != cudaStreamCaptureModeRelaxed)
        return break_captures(cudaErrorStreamCaptureImplicit, kernel->name + " on the default stream");
  counts["launches outside graphs"]++;
  take_time(stream, kernel_ns);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t num_bytes, Stream* stream, bool is_async) {
  Guard guard(lock);
  if (!num_bytes) return cudaSuccess;
  bool to_device = is_on_device(to), from_device = is_on_device(from);
  bool is_pageable = (!to_device && !is_pinned(to)) || (!from_device && !is_pinned(from));
  if (is_async && stream->capture) {
    if (is_pageable) return break_captures(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    stream->capture->graph->copies.push_back({to, from, num_bytes});
    return cudaSuccess;
  }
  if (!is_async) CHECK_CAPTURES("cudaMemcpy");
  std::string kind = to_device && from_device ? "copies on the device"
                     : to_device              ? "copies to the device"
                                              : "copies to the host";
  counts[is_pageable ? "pageable " + kind : kind]++;
  if (!is_async || is_pageable) wait_until(stream->busy_until);
  // Nobody computed a device's small results, which are token ids: the host reads zeros, and goes on. A number of
  // eight bytes that is no pair of token ids is a size.
  bool is_size = num_bytes == 8 && from_device && *static_cast<const uint64_t*>(from) >> 32 == 0;
  if (!IS_COMPUTED && from_device && !to_device && num_bytes <= 65536 && !is_size) {
    memset(to, 0, num_bytes);
  } else if (IS_COMPUTED || !from_device || !to_device || num_bytes <= 64 << 20) {
    memmove(to, from, num_bytes);  // but not what fills the machine's memory for nothing
  }
  return cudaSuccess;
}

cudaError_t fill(void* memory, int value, size_t num_bytes, Stream* stream) {
  Guard guard(lock);
  if (stream->capture) return cudaSuccess;
  if (num_bytes <= 16 << 20 || IS_COMPUTED) memset(memory, value, num_bytes);
  take_time(stream, 0);
  return cudaSuccess;
}

void* allocate(size_t num_bytes) {
  size_t size = (num_bytes + ALLOCATION_UNIT - 1) / ALLOCATION_UNIT * ALLOCATION_UNIT;
  if (num_allocated + size > TOTAL_BYTES - CONTEXT_BYTES) return nullptr;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  device_memory[reinterpret_cast<uintptr_t>(memory)] = size;
  num_allocated += size;
  most_allocated = std::max(most_allocated, num_allocated);
  return memory;
}

void* handle() { return calloc(1, 4096); }

std::string counts_as_text() {
  std::string text;
  for (auto& [name, count] : counts) text += name + " " + std::to_string(count) + "; ";
  text += "most MiB " + std::to_string(most_allocated >> 20);
  return text + "; idle us " + std::to_string(idle_ns / 1000) + "; busy us " + std::to_string(busy_ns / 1000);
}

struct AtExit {
  ~AtExit() {
    if (!counts.empty()) note("end", counts_as_text());
  }
} at_exit;

cudaStreamCaptureStatus status_of(const Capture* capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->is_broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

Kernel unknown_kernel{"a library's", LARGEST_SHARED}, product{"cublas", LARGEST_SHARED},
    collective{"nccl", LARGEST_SHARED};

Kernel* kernel_of(const void* host_function) {
  Guard guard(lock);
  auto found = runtime_kernels.find(host_function);
  return found == runtime_kernels.end() ? &unknown_kernel : found->second;
}

}  // namespace

extern "C" {

// ---- What a test asks
int64_t null_device_count(const char* name) {
  Guard guard(lock);
  return counts[name];
}
int64_t null_device_idle_ns() { return idle_ns; }
int64_t null_device_busy_ns() { return busy_ns; }
void null_device_set_kernel_ns(int64_t span_ns) { kernel_ns = span_ns; }

// ---- The runtime: devices
cudaError_t cudaGetDeviceCount(int* count) {
  *count = NUM_DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= NUM_DEVICES) return fail(cudaErrorInvalidDevice, "cudaSetDevice");
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> VALUES = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, LARGEST_SHARED},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, NUM_SMS},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrManagedMemory, 1},
  };
  auto found = VALUES.find(attribute);
  *value = found == VALUES.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  strcpy(properties->name, NAME);
  properties->totalGlobalMem = TOTAL_BYTES;
  properties->major = 9;
  properties->multiProcessorCount = NUM_SMS;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = LARGEST_SHARED;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->l2CacheSize = 50 << 20;
  properties->memoryBusWidth = 5120;
  properties->textureAlignment = 512;
  properties->unifiedAddressing = properties->concurrentKernels = properties->canMapHostMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  {
    Guard guard(lock);
    CHECK_CAPTURES("cudaDeviceSynchronize");
    counts["device synchronized"]++;
  }
  wait_until(default_stream.busy_until);
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof text, "cudaError %d", error);
  return text;
}
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof text, "error %d of the null device", error);
  return text;
}
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- The runtime: memory
cudaError_t cudaMalloc(void** memory, size_t num_bytes) {
  Guard guard(lock);
  CHECK_CAPTURES("cudaMalloc");
  counts["allocations"]++;
  *memory = allocate(num_bytes ? num_bytes : 1);
  return *memory ? cudaSuccess : fail(cudaErrorMemoryAllocation, "cudaMalloc of " + std::to_string(num_bytes));
}
cudaError_t cudaFree(void* memory) {
  Guard guard(lock);
  if (!memory) return cudaSuccess;
  CHECK_CAPTURES("cudaFree");
  auto found = device_memory.find(reinterpret_cast<uintptr_t>(memory));
  if (found == device_memory.end()) return fail(cudaErrorInvalidValue, "cudaFree");
  munmap(memory, found->second);
  num_allocated -= found->second;
  device_memory.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t num_bytes, cudaStream_t) { return cudaMalloc(memory, num_bytes); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Guard guard(lock);
  *total = TOTAL_BYTES;
  *free = TOTAL_BYTES - CONTEXT_BYTES - num_allocated;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t num_bytes, unsigned) {
  Guard guard(lock);
  CHECK_CAPTURES("cudaHostAlloc");
  if (posix_memalign(memory, 4096, num_bytes ? num_bytes : 1)) return fail(cudaErrorMemoryAllocation, "cudaHostAlloc");
  pinned_memory[reinterpret_cast<uintptr_t>(*memory)] = num_bytes ? num_bytes : 1;
  counts["pinned allocations"]++;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  Guard guard(lock);
  CHECK_CAPTURES("cudaFreeHost");
  pinned_memory.erase(reinterpret_cast<uintptr_t>(memory));
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t num_bytes, unsigned) {
  Guard guard(lock);
  CHECK_CAPTURES("cudaHostRegister");
  pinned_memory[reinterpret_cast<uintptr_t>(memory)] = num_bytes;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  Guard guard(lock);
  pinned_memory.erase(reinterpret_cast<uintptr_t>(memory));
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** on_device, void* memory, unsigned) {
  *on_device = memory;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind) {
  return copy(to, from, num_bytes, &default_stream, false);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, num_bytes, stream_of(stream), true);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t num_bytes, cudaStream_t stream) {
  return copy(to, from, num_bytes, stream_of(stream), true);
}
cudaError_t cudaMemset(void* memory, int value, size_t num_bytes) {
  CHECK_CAPTURES("cudaMemset");
  return fill(memory, value, num_bytes, &default_stream);
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t num_bytes, cudaStream_t stream) {
  return fill(memory, value, num_bytes, stream_of(stream));
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  Guard guard(lock);
  bool is_device = is_on_device(memory);
  *attributes = {};
  attributes->type = is_device           ? cudaMemoryTypeDevice
                     : is_pinned(memory) ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  attributes->device = is_device ? 0 : -1;
  (is_device ? attributes->devicePointer : attributes->hostPointer) = const_cast<void*>(memory);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return cudaSuccess;
}

// ---- The runtime: streams and events
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (stream->capture) return break_captures(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
  CHECK_CAPTURES("cudaStreamQuery");
  return now() >= stream->busy_until ? cudaSuccess : last_error = cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  {
    Guard guard(lock);
    if (stream->capture) return break_captures(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
    CHECK_CAPTURES("cudaStreamSynchronize");
    counts["stream synchronized"]++;
  }
  wait_until(stream->busy_until);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t awaited, unsigned) {
  Guard guard(lock);
  Stream* stream = stream_of(waiting);
  Event* event = reinterpret_cast<Event*>(awaited);
  if (event->capture && captures.count(event->capture)) {  // the stream joins the capture
    if (stream == &default_stream) return break_captures(cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent");
    if (stream->capture && stream->capture != event->capture)
      return break_captures(cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent");
    stream->capture = event->capture;
    event->capture->streams.insert(stream);
  } else if (stream->capture && event->is_recorded) {
    return break_captures(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
  } else {
    stream->busy_until = std::max(stream->busy_until, event->moment);
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t recorded, cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  *reinterpret_cast<Event*>(recorded) = {std::max(now(), stream->busy_until), true, stream->capture};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
static cudaError_t check_event(const Event* event, const char* where) {
  if (event->capture && captures.count(event->capture)) return break_captures(cudaErrorCapturedEvent, where);
  return check_captures(where);
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Guard guard(lock);
  Event* event = reinterpret_cast<Event*>(handle);
  if (cudaError_t error = check_event(event, "cudaEventQuery")) return error;
  return now() >= event->moment ? cudaSuccess : last_error = cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event* event = reinterpret_cast<Event*>(handle);
  {
    Guard guard(lock);
    if (cudaError_t error = check_event(event, "cudaEventSynchronize")) return error;
    counts["event synchronized"]++;
  }
  wait_until(event->moment);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* span_ms, cudaEvent_t start, cudaEvent_t end) {
  *span_ms = (reinterpret_cast<Event*>(end)->moment - reinterpret_cast<Event*>(start)->moment) / 1e6f;
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

// ---- The runtime: captures and graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (stream == &default_stream) return fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
  if (stream->capture) return fail(cudaErrorIllegalState, "a capture within a capture");
  stream->capture = new Capture{++num_captures, mode, pthread_self(), {stream}};
  captures.insert(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Guard guard(lock);
  Capture* capture = stream_of(handle)->capture;
  *graph = nullptr;
  if (!capture) return fail(cudaErrorIllegalState, "the end of no capture");
  for (Stream* stream : capture->streams) stream->capture = nullptr;
  captures.erase(capture);
  if (capture->is_broken) return fail(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  counts["captures"]++;
  note("captured", std::to_string(capture->graph->num_kernels) + " kernels");
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Guard guard(lock);
  *status = status_of(stream_of(stream)->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  Guard guard(lock);
  Capture* capture = stream_of(stream)->capture;
  *status = status_of(capture);
  if (capture && id) *id = capture->id;
  if (capture && graph) *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* num_nodes) {
  *num_nodes = reinterpret_cast<Graph*>(graph)->num_kernels;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Guard guard(lock);
  const Graph* graph = reinterpret_cast<Graph*>(executable);
  counts["graphs launched"]++;
  counts["launches in graphs"] += graph->num_kernels;
  take_time(stream_of(stream), kernel_ns * static_cast<int64_t>(graph->num_kernels));
  for (const Copy& one : graph->copies) {
    bool is_there = (is_on_device(one.to) || is_pinned(one.to)) && (is_on_device(one.from) || is_pinned(one.from));
    if (!is_there) return fail(cudaErrorIllegalAddress, "a graph copies memory that was freed");
    if (!IS_COMPUTED) memmove(one.to, one.from, one.num_bytes);
  }
  return cudaSuccess;
}

// ---- The runtime: kernels of libraries
void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(handle()); }
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  Guard guard(lock);
  runtime_kernels[host_function] = new Kernel{name, LARGEST_SHARED};
}
struct Configuration {
  dim3 grid, block;
  size_t num_shared;
  void* stream;
};
static thread_local std::vector<Configuration> configurations;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t num_shared, void* stream) {
  configurations.push_back({grid, block, num_shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* num_shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *num_shared = last.num_shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = reinterpret_cast<cudaKernel_t>(kernel_of(host_function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t num_shared,
                               cudaStream_t stream) {
  return launch(reinterpret_cast<Kernel*>(kernel), grid, block, num_shared, stream_of(stream));
}
cudaError_t cudaLaunchKernel(const void* host_function, dim3 grid, dim3 block, void**, size_t num_shared,
                             cudaStream_t stream) {
  return launch(kernel_of(host_function), grid, block, num_shared, stream_of(stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host_function, void**) {
  Stream* stream = stream_of(config->stream);
  return launch(kernel_of(host_function), config->gridDim, config->blockDim, config->dynamicSmemBytes, stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = LARGEST_SHARED;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num_blocks, const void*, int, size_t,
                                                                   unsigned) {
  *num_blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*function) note("missing", name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- The driver, as torch and Triton's launchers use it
static CUresult result_of(cudaError_t error) { return static_cast<CUresult>(error); }
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return result_of(cudaDriverGetVersion(version)); }
CUresult cuDeviceGetCount(int* count) { return result_of(cudaGetDeviceCount(count)); }
CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return result_of(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}
CUresult cuDeviceGetUuid(CUuuid* id, CUdevice device) {
  memset(id, device + 1, sizeof *id);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0, *is_active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  static void* const one = handle();
  *context = static_cast<CUcontext>(one);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  Guard guard(lock);
  if (cudaError_t error = check_captures("cuModuleLoadData")) return result_of(error);
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = static_cast<CUmodule>(handle());
  counts["modules"]++;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  note("module", name);
  *function = reinterpret_cast<CUfunction>(new Kernel{name});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || static_cast<size_t>(value) > LARGEST_SHARED) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Kernel*>(function)->most_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  const dim3 grid(config->gridDimX, config->gridDimY, config->gridDimZ);
  const dim3 block(config->blockDimX, config->blockDimY, config->blockDimZ);
  Stream* stream = stream_of(config->hStream);
  return result_of(launch(reinterpret_cast<Kernel*>(function), grid, block, config->sharedMemBytes, stream));
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned num_shared, CUstream stream, void**, void**) {
  const Kernel* kernel = reinterpret_cast<Kernel*>(function);
  return result_of(launch(kernel, dim3(x, y, z), dim3(block_x, block_y, block_z), num_shared, stream_of(stream)));
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  *count = 16;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, CUfunction, int, size_t) {
  *num_blocks = 2;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  Guard guard(lock);
  const void* memory = reinterpret_cast<void*>(address);
  bool is_device = is_on_device(memory);
  if (!is_device && !is_pinned(memory)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *static_cast<CUdeviceptr*>(value) = address;
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *static_cast<unsigned*>(value) = is_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else
    *static_cast<unsigned*>(value) = 0;
  return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* num_bytes, CUdeviceptr address) {
  Guard guard(lock);
  auto found = range_of(device_memory, reinterpret_cast<void*>(address));
  if (found == device_memory.end()) return CUDA_ERROR_INVALID_VALUE;
  if (start) *start = found->first;
  if (num_bytes) *num_bytes = found->second;
  return CUDA_SUCCESS;
}

// ---- cuBLAS: a handle knows its stream, and a product is a kernel
int cublasCreate_v2(void** made) {
  *made = handle();
  return 0;
}
int cublasSetStream_v2(cudaStream_t* blas, cudaStream_t stream) {
  *blas = stream;
  return 0;
}
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
static int multiply(cudaStream_t stream) { return launch(&product, dim3(1), dim3(128), 0, stream_of(stream)) ? 14 : 0; }
int cublasSgemm_v2(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasDgemm_v2(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasSgemv_v2(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasGemmEx(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasSgemmEx(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasGemmStridedBatchedEx(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasSgemmStridedBatched(cudaStream_t* blas, ...) { return multiply(*blas); }
int cublasLtMatmulDescCreate(void** made, int, int) { return cublasCreate_v2(made); }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return cublasCreate_v2(made); }
int cublasLtMatmulPreferenceCreate(void** made) { return cublasCreate_v2(made); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  memset(found, 0, 96);
  *count = 1;
  return 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return multiply(stream);
}

// ---- NCCL: a communicator knows its rank, and a collective is a kernel
struct Communicator {
  int count, rank;
};
struct UniqueId {
  char bytes[128];
};
int ncclGetVersion(int* version) {
  *version = 22809;
  return 0;
}
int ncclCommInitRankConfig(void** made, int count, UniqueId, int rank, void*) {
  *made = new Communicator{count, rank};
  return 0;
}
int ncclCommInitRank(void** made, int count, UniqueId id, int rank) {
  return ncclCommInitRankConfig(made, count, id, rank, nullptr);
}
int ncclCommCount(Communicator* communicator, int* count) {
  *count = communicator->count;
  return 0;
}
int ncclCommUserRank(Communicator* communicator, int* rank) {
  *rank = communicator->rank;
  return 0;
}
int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }
const char* ncclGetErrorString(int) { return "an error of the null device"; }
const char* ncclGetLastError(void*) { return ""; }
static int collect(cudaStream_t stream) {
  return launch(&collective, dim3(1), dim3(256), 0, stream_of(stream)) ? 1 : 0;
}
int ncclAllReduce(const void*, void*, size_t, int, int, void*, cudaStream_t stream) { return collect(stream); }
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, cudaStream_t stream) { return collect(stream); }
int ncclAllGather(const void*, void*, size_t, int, void*, cudaStream_t stream) { return collect(stream); }
int ncclBroadcast(const void*, void*, size_t, int, int, void*, cudaStream_t stream) { return collect(stream); }
int ncclBcast(void*, size_t, int, int, void*, cudaStream_t stream) { return collect(stream); }

}  // extern "C"
