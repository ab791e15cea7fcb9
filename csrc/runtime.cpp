// Threads and memory: the only file that knows OpenMP and the operating system.
#include "common.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace atp_fast {

void parallel(Index units, int threads, void (*body)(void*, Index, int), void* context) {
    const int used = static_cast<int>(std::min<Index>(std::max(threads, 1), units));
    if (used <= 1) {
        for (Index unit = 0; unit < units; ++unit) body(context, unit, 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(used)
    {
        // Which thread runs a unit is left to chance; what a unit computes is not.
        int self = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (Index unit = 0; unit < units; ++unit) body(context, unit, self);
    }
#else
    std::atomic<Index> next{0};
    auto work = [&](int self) {
        for (Index unit; (unit = next++) < units;) body(context, unit, self);
    };
    std::vector<std::thread> team;
    for (int self = 1; self < used; ++self) team.emplace_back(work, self);
    work(0);
    for (auto& member : team) member.join();
#endif
}

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] Index bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t page = 1 << 21;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
    if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Scratch::Scratch(Index bytes) {
    const std::size_t rounded =
        (static_cast<std::size_t>(std::max<Index>(bytes, 1)) + 63) / 64 * 64;
    data_ = static_cast<char*>(std::aligned_alloc(64, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace atp_fast
