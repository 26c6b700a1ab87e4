#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace spec_rollout::cpu {
namespace {

struct Job {
  int64_t count, grain;
  const std::function<void(int64_t, int64_t)>* body;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;

  void work() {
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        (*body)(begin, std::min(count, begin + grain));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  // One job at a time; a second caller (another Python thread) runs its job alone rather than wait.
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> owner(owner_mutex_, std::try_to_lock);
    if (!owner.owns_lock()) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        threads_.emplace_back([this] { loop(); });
      }
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not started by now need not
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_all();
    }
  }

  std::mutex owner_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0, active_ = 0;
};

Pool* g_pool = nullptr;
std::mutex g_pool_mutex;

// Never destroyed: worker threads may outlive static destructors. After fork() the child has no
// workers, so it starts with a pool of its own.
Pool& pool() {
  std::lock_guard<std::mutex> lock(g_pool_mutex);
  if (g_pool == nullptr) {
    g_pool = new Pool;
    static const int registered =
        pthread_atfork([] { g_pool_mutex.lock(); }, [] { g_pool_mutex.unlock(); },
                       [] {
                         g_pool = nullptr;
                         g_pool_mutex.unlock();
                       });
    (void)registered;
  }
  return *g_pool;
}

// GOMP_parallel of a GNU OpenMP runtime that is loaded already (torch brings one), or null. Its
// threads spin for a while after each of torch's operations; threads of our own would share the
// cores with them.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
// The thread sanitizer does not see how that runtime's threads wait for each other.
#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
#define SPEC_ROLLOUT_USES_OPENMP
#endif
std::atomic<bool> g_forked{
    false};  // a child process has none of the runtime's threads, and would wait for them
#if defined(SPEC_ROLLOUT_USES_OPENMP)
// From the start: before any parallel work of ours, torch's may have started those threads.
[[maybe_unused]] const int g_watches_forks =
    pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
#endif

OpenMpParallel find_openmp() {
#if defined(SPEC_ROLLOUT_USES_OPENMP)
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        // Of several, the one that torch's wheel carries.
        const char* name = info->dlpi_name;
        auto& path = *static_cast<std::string*>(found);
        if (std::strstr(name, "libgomp") == nullptr) return 0;
        if (path.empty() || std::strstr(name, "torch") != nullptr) path = name;
        return 0;
      },
      &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

void run(Job& job, int helpers) {
  static const OpenMpParallel openmp = find_openmp();
  if (openmp == nullptr || g_forked) return pool().run(job, helpers);
  openmp([](void* work) { static_cast<Job*>(work)->work(); }, &job,
         static_cast<unsigned>(helpers + 1), 0);
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(1, grain);
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, pieces)) - 1;
  if (helpers <= 0) return body(0, count);
  Job job;
  job.count = count;
  job.grain = grain;
  job.body = &body;
  run(job, helpers);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace spec_rollout::cpu
