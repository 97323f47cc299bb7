/* A small pool of threads that run one function together: `fn(argument, rank, count)` on every rank, with barriers inside.
 *
 * Workers spin shortly for the next call and then sleep. A forked child starts with no workers and makes its own.
 */
#ifndef MILES_POOL_H
#define MILES_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MAX_THREADS 64
#define SPINS 4000

typedef void (*task)(void *argument, int rank, int count);

static struct {
    pthread_mutex_t lock, use;
    pthread_cond_t wake;
    atomic_uint call, done, arrived, phase;
    atomic_int count;
    int workers;
    unsigned born[MAX_THREADS]; /* the call before a worker's first */
    task fn;
    void *argument;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .use = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

INLINE void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* All `count` ranks of the running call meet. */
INLINE void barrier(int count) {
    if (count == 1) return;
    unsigned phase = atomic_load(&pool.phase);
    if (atomic_fetch_add(&pool.arrived, 1) + 1 == (unsigned)count) {
        atomic_store(&pool.arrived, 0);
        atomic_fetch_add(&pool.phase, 1);
        return;
    }
    for (int spin = 0; atomic_load_explicit(&pool.phase, memory_order_acquire) == phase; spin++)
        if (spin < SPINS) pause_cpu();
        else sched_yield();
}

static void *worker(void *given) {
    int rank = (int)(intptr_t)given;
    unsigned seen = pool.born[rank];
    for (;;) {
        for (int spin = 0; atomic_load(&pool.call) == seen; spin++) {
            if (spin < SPINS) {
                pause_cpu();
                continue;
            }
            pthread_mutex_lock(&pool.lock);
            while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.call);
        int count = atomic_load(&pool.count);
        if (rank < count) pool.fn(pool.argument, rank, count);
        atomic_fetch_add(&pool.done, 1);
    }
    return 0;
}

static void forget_workers(void) { /* in a forked child, which has only the thread that forked */
    pthread_mutex_init(&pool.lock, 0);
    pthread_mutex_init(&pool.use, 0);
    pthread_cond_init(&pool.wake, 0);
    pool.workers = 0;
    atomic_store(&pool.arrived, 0);
}

/* Run fn on `count` ranks, this thread being rank 0; fewer when threads cannot be made or another call is under way. */
static void run(task fn, void *argument, int count) {
    if (count > MAX_THREADS) count = MAX_THREADS;
    if (count <= 1 || pthread_mutex_trylock(&pool.use)) {
        fn(argument, 0, 1);
        return;
    }
    static int registered;
    if (!registered) registered = 1, pthread_atfork(0, 0, forget_workers);
    while (pool.workers < count - 1) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pool.born[pool.workers + 1] = atomic_load(&pool.call);
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_attr_destroy(&attributes);
        pool.workers++;
    }
    if (count > pool.workers + 1) count = pool.workers + 1;
    pool.fn = fn, pool.argument = argument;
    atomic_store(&pool.count, count);
    atomic_store(&pool.done, 0);
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.call, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    fn(argument, 0, count);
    for (int spin = 0; atomic_load(&pool.done) < (unsigned)pool.workers; spin++)
        if (spin < SPINS) pause_cpu();
        else sched_yield();
    pthread_mutex_unlock(&pool.use);
}

/* Rank's share [*start, *stop) of `total` items in multiples of `unit`. */
INLINE void share(long total, long unit, int rank, int count, long *start, long *stop) {
    long blocks = (total + unit - 1) / unit;
    *start = blocks * rank / count * unit;
    *stop = blocks * (rank + 1) / count * unit;
    if (*start > total) *start = total;
    if (*stop > total) *stop = total;
}

#endif
