// SPDX-License-Identifier: Apache-2.0

#include "threads.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "plan.h"

namespace nearsight {

namespace {

// The OpenMP runtime's threads do not survive a fork, and waiting for them would hang.
std::atomic<bool> in_child_of_fork{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_child_of_fork = true; });

constexpr size_t kKeptScratch = (size_t)32 << 20;  // bytes

// A thread keeps its scratch memory from call to call: fresh pages cost more than the work of a small map. What is too
// large for that goes back to the system after the call; to fill it takes longer than to get it.
class Scratch {
  public:
    ~Scratch() { free(data_); }
    void give_back() {
        if (size_ <= kKeptScratch) return;
        free(data_);
        data_ = nullptr;
        size_ = 0;
    }
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            free(data_);
            size_ = 0;
            data_ = nullptr;
            void* fresh = nullptr;
            if (posix_memalign(&fresh, 64, bytes) != 0) return nullptr;
            data_ = (char*)fresh;
            size_ = bytes;
            memset(data_, 0, sizeof(Leftover));
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch scratch;

// Heads that a thread takes at a time: as many as leave work enough to share out evenly. In heads-last memory
// neighbouring heads lie in the same lines, and threads that write to one line at once wait for each other.
int heads_at_a_time(int64_t heads, int64_t jobs, int num_threads) {
    int64_t some = heads;
    while (some > 1 && heads * jobs / some < 8 * (int64_t)num_threads) some = (some + 1) / 2;
    return (int)some;
}

// `count` jobs, so many of them in a row. A thread that is not ours gives back its memory as it goes.
void run_on(const nearsight_executor& executor, int64_t count, int at_a_time, const std::function<void(int64_t)>& one) {
    struct Jobs {
        const std::function<void(int64_t)>& one;
        int64_t count, at_a_time;
    } all = {one, count, at_a_time};
    const auto some = [](void* data, int64_t i) {
        const Jobs& jobs = *(const Jobs*)data;
        const int64_t last = std::min(jobs.count, (i + 1) * jobs.at_a_time);
        for (int64_t job = i * jobs.at_a_time; job < last; ++job) jobs.one(job);
        scratch.give_back();
    };
    executor.run(executor.context, some, &all, (count + at_a_time - 1) / at_a_time);
}

}  // namespace

int run(int64_t heads, int64_t jobs, size_t bytes, const Work& work, int num_threads,
        const nearsight_executor* executor) {
    const int64_t count = heads * jobs;
    std::atomic<bool> failed{false};
    // Heads innermost: neighbouring heads share cache lines of heads-last memory.
    const auto one = [&](int64_t i) {
        char* workspace = scratch.reserve(bytes);
        if (workspace)
            work(i % heads, i / heads, workspace);
        else
            failed = true;
    };
    const auto result = [&] { return failed ? NEARSIGHT_ERROR_MEMORY : NEARSIGHT_OK; };
    if (num_threads > 1 && count > 1) {
        const int at_a_time = heads_at_a_time(heads, jobs, num_threads);
        if (executor) {
            run_on(*executor, count, at_a_time, one);
            return result();
        }
#if defined(_OPENMP)
        if (!in_child_of_fork) {
#pragma omp parallel num_threads(num_threads)
            {
#pragma omp for schedule(dynamic, at_a_time)
                for (int64_t i = 0; i < count; ++i) one(i);
                scratch.give_back();
            }
            return result();
        }
#endif
    }
    for (int64_t i = 0; i < count; ++i) one(i);
    scratch.give_back();
    return result();
}

}  // namespace nearsight
