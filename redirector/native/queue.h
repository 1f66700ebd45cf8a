/* Many producers, one consumer: a list of requests with one atomic word.
 *
 * Invariant: a request is in at most one queue, linked through `next`, and belongs to whoever took it.
 * `csv_queue_push` tells whether the queue was empty, so that only the first of a burst wakes the
 * consumer. FIFO for each producer.
 */
#ifndef CSVFS_QUEUE_H
#define CSVFS_QUEUE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "session.h"

struct csv_queue {
    _Atomic(struct csv_request *) newest;
};

static inline bool csv_queue_push(struct csv_queue *queue, struct csv_request *request)
{
    struct csv_request *newest = atomic_load_explicit(&queue->newest, memory_order_relaxed);
    do {
        request->next = newest;
    } while (!atomic_compare_exchange_weak_explicit(&queue->newest, &newest, request,
                                                    memory_order_seq_cst, memory_order_relaxed));
    return newest == NULL;
}

static inline bool csv_queue_empty(struct csv_queue *queue)
{
    return atomic_load_explicit(&queue->newest, memory_order_seq_cst) == NULL;
}

/* All that is queued, the oldest first; NULL if nothing. */
static inline struct csv_request *csv_queue_take(struct csv_queue *queue)
{
    struct csv_request *newest = NULL, *oldest = NULL;

    if (atomic_load_explicit(&queue->newest, memory_order_relaxed) != NULL)
        newest = atomic_exchange_explicit(&queue->newest, NULL, memory_order_acq_rel);
    while (newest) {
        struct csv_request *older = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = older;
    }
    return oldest;
}

#endif
