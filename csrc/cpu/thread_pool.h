// Threads that work through one pass together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace speeder::cpu {

// Meets all threads of a pass between two phases. It spins for a while, then lets others run.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

private:
    const int threads_;
    std::atomic<int> waiting_{0};
    std::atomic<unsigned> round_{0};
};

// One pool a process: passes of several engines take turns. Made anew in a child after fork.
class ThreadPool {
public:
    static ThreadPool& shared();

    // Runs work(thread) on `threads` threads, the caller's own among them, and returns when all have ended. What one
    // throws is thrown here, once all have ended: work that meets at a barrier must not throw.
    void run(int threads, const std::function<void(int)>& work);

    ~ThreadPool();

private:
    ThreadPool();
    void grow(int threads);
    void serve(int thread, unsigned seen);

    const int owner_;  // the process
    std::mutex turn_;
    std::mutex mutex_;
    std::condition_variable_any begun_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    int wanted_ = 0;
    std::atomic<unsigned> round_{0};
    std::atomic<int> running_{0};
    bool stopped_ = false;
    std::exception_ptr failure_;
};

}  // namespace speeder::cpu
