// The ops inside XLA on CPUs: the core's kernels, on XLA's own thread pool.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/contract.h"
#include "core/cpu/kernels.h"
#include "core/cpu/pages.h"
#include "core/cpu/work_sharing.h"
#include "ops/signature.h"
#include "tf/status.h"
#include "tf/xla/custom_call.h"
#include "tf/xla/handler.h"

namespace cbam_ops {
namespace tf {
namespace {

template <const auto& kSignature>
absl::Status RunOnHost(ffi::ThreadPool* pool, const ffi::RemainingArgs& operands,
                       const ffi::RemainingRets& results, const ffi::Dictionary& dictionary) {
  AttributeReader attributes(kSignature.op, dictionary);
  using Args = typename CustomCall<kSignature>::Args;
  CustomCall<kSignature> call;
  absl::Status status = call.Unpack(operands, results, &attributes);
  if (!status.ok()) return status;
  int threads = 0;
  status = attributes.GetAttr(kThreads, &threads);
  if (!status.ok()) return status;
  status = attributes.CheckAllRead();
  if (!status.ok()) return status;
  if (threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(kSignature.op, ": `", kThreads, "` must be at least 1, got ", threads));
  }

  // The caller works too, and waits for nothing that has not started (work_sharing.h).
  cpu::WorkSharing sharing(static_cast<int>(std::min<int64_t>(threads, pool->num_threads())),
                           [pool](std::function<void()> work) { pool->Schedule(std::move(work)); });
  cpu::Parallel parallel = sharing.parallel();
  parallel.threads = threads;

  void* workspace = nullptr;
  status =
      call.Workspace(cpu::WorkspaceBytes<Args>(call.problem, parallel), kHostAlignment, &workspace);
  if (!status.ok()) return status;
  for (size_t i = 0; i < results.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    cpu::PreferLargePages((*result)->untyped_data(), (*result)->size_bytes());
  }
  return ToAbslStatus(kSignature.op, cpu::Run(call.problem, call.args, workspace, parallel));
}

template <const auto& kSignature>
ffi::Error ExecuteOnHost(ffi::ThreadPool pool, ffi::RemainingArgs operands,
                         ffi::RemainingRets results, ffi::Dictionary attributes) {
  return ToFfiError(RunOnHost<kSignature>(&pool, operands, results, attributes));
}

template <const auto& kSignature>
bool RegisterOnHost() {
  XLA_FFI_DEFINE_HANDLER(
      handler, ExecuteOnHost<kSignature>,
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
  return RegisterHandler(kSignature.op, "Host", {nullptr, nullptr, nullptr, handler});
}

template <const auto&... kSignatures>
bool RegisterAllOnHost(ops::OpList<kSignatures...>) {
  return (RegisterOnHost<kSignatures>() && ...);
}

}  // namespace

bool RegisterHostHandlers() { return RegisterAllOnHost(ops::AllOps()); }

}  // namespace tf
}  // namespace cbam_ops
