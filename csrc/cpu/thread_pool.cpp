#include "thread_pool.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace speeder::cpu {

namespace {

// Some microseconds. Where every core is ours, to yield costs nothing; where another process has one, whoever spins
// takes its time from the very thread it waits for: with 4,000 rounds a pass on a shared core took a fifth longer.
constexpr int kSpins = 100;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

template <class Done>
bool spin(Done done) {
    for (int i = 0; i < kSpins; ++i) {
        if (done()) return true;
        relax();
    }
    return done();
}

// Never sleeps: a thread that is woken beside a busy core starts on its waker's, and both share one until the system
// notices.
template <class Done>
void spin_then_yield(Done done) {
    if (spin(done)) return;
    while (!done()) std::this_thread::yield();
}

}  // namespace

void Barrier::wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    spin_then_yield([&] { return round_.load(std::memory_order_acquire) != round; });
}

ThreadPool& ThreadPool::shared() {
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    const std::lock_guard lock(mutex);
    // after a fork its threads are gone: left where they are, since joining them would wait for ever
    if (pool == nullptr || pool->owner_ != getpid()) pool = new ThreadPool();
    return *pool;
}

ThreadPool::ThreadPool() : owner_(getpid()) {}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard lock(mutex_);
        stopped_ = true;
    }
    begun_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::grow(int threads) {
    while (static_cast<int>(threads_.size()) < threads - 1) {
        const int thread = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, thread, seen = round_.load()] { serve(thread, seen); });
    }
}

void ThreadPool::serve(int thread, unsigned seen) {
    for (;;) {
        const auto begun = [&] { return round_.load(std::memory_order_acquire) != seen; };
        spin(begun);
        const std::function<void(int)>* work = nullptr;
        {
            std::unique_lock lock(mutex_);
            begun_.wait(lock, [&] { return stopped_ || begun(); });
            if (stopped_) return;
            seen = round_.load(std::memory_order_relaxed);
            // whoever is not wanted may come late, when the round is over and the work gone
            if (thread < wanted_) work = work_;
        }
        if (work == nullptr) continue;
        try {
            (*work)(thread);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            failure_ = std::current_exception();
        }
        running_.fetch_sub(1, std::memory_order_release);
    }
}

void ThreadPool::run(int threads, const std::function<void(int)>& work) {
    if (threads <= 1) return work(0);
    const std::lock_guard turn(turn_);
    grow(threads);
    failure_ = nullptr;
    {
        const std::lock_guard lock(mutex_);
        work_ = &work;
        wanted_ = threads;
        running_.store(threads - 1, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
    }
    begun_.notify_all();
    try {
        work(0);
    } catch (...) {
        const std::lock_guard lock(mutex_);
        failure_ = std::current_exception();
    }
    spin_then_yield([&] { return running_.load(std::memory_order_acquire) == 0; });
    const std::lock_guard lock(mutex_);
    wanted_ = 0;
    if (failure_) std::rethrow_exception(failure_);
}

}  // namespace speeder::cpu
