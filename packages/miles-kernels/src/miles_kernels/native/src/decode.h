/* A whole forward pass of a dense decoder over packed tokens and a paged cache, in one call.
 *
 * All ranks walk through the layers together, a barrier between operations. The operations are those of the entry points, so this
 * is the same arithmetic as calling them one by one.
 */
#ifndef MILES_DECODE_H
#define MILES_DECODE_H

typedef struct {
    const float *input_norm, *qkv, *qkv_bias, *qk_norm, *o, *o_bias, *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    float *k_pool, *v_pool;
    int64_t window; /* 0: none */
} Layer;

typedef struct {
    int64_t hidden, heads, kv_heads, dim, inner, vocab, num_layers, depth, head_stride, slot_stride;
    float eps, scale;
    const float *embedding, *norm, *head, *cos, *sin;
    const Layer *layers;
} Model;

typedef struct {
    const Model *model;
    int64_t rows, num_out, table_width;
    const int64_t *token_ids, *positions, *slots; /* [rows] */
    const int64_t *table, *table_row;             /* slots of keys: table[table_row[r] * table_width + j] */
    const int64_t *out_rows;                      /* [num_out] rows whose logits are wanted */
    float *hidden, *logits;                       /* [rows, hidden] after the last norm; [num_out, vocab] */
    float *x, *wide, *panels, *room;              /* scratch: [rows, hidden], [rows, widest], panels, [threads, table_width + 16] */
} Pass;

static void norms_to_panels(const Model *m, const Pass *p, const float *x, const float *weight, const int64_t *pick, long rows,
                            float *out, int rank, int count) {
    (void)p;
    float row[m->hidden];
    for (long r = rank; r < rows; r += count) {
        const float *from = x + (pick ? pick[r] : r) * m->hidden;
        float *to = out ? out + r * m->hidden : row;
        if (weight) norm_row(from, weight, to, m->hidden, m->eps);
        to_panel(p->panels, m->hidden, r, weight ? to : from);
    }
}

static void attention_block(const Model *m, const Pass *p, const Layer *l, int rank, int count) {
    long D = m->dim, q = m->heads * D, kv = m->kv_heads * D, group = m->heads / m->kv_heads, wide = q + 2 * kv;
    for (long r = rank; r < p->rows; r += count) {
        float *row = p->wide + r * wide, turned[D];
        const float *cos = m->cos + p->positions[r] * D, *sin = m->sin + p->positions[r] * D;
        for (long h = 0; h < m->heads + m->kv_heads; h++) {
            float *head = row + h * D;
            if (l->qk_norm) norm_row(head, l->qk_norm + (h < m->heads ? 0 : D), head, D, m->eps);
            rope_row(head, cos, sin, turned, D);
            memcpy(head, turned, D * sizeof(float));
        }
        for (long h = 0; h < m->kv_heads; h++) {
            long to = h * m->head_stride + p->slots[r] * m->slot_stride;
            memcpy(l->k_pool + to, row + q + h * D, D * sizeof(float));
            memcpy(l->v_pool + to, row + q + kv + h * D, D * sizeof(float));
        }
    }
    barrier(count);
    float *room = p->room + rank * (p->table_width + 16), out[group * D];
    for (long item = rank; item < p->rows * m->kv_heads; item += count) {
        long r = item / m->kv_heads, h = item % m->kv_heads, last = p->positions[r];
        long first = l->window > 0 && last - l->window + 1 > 0 ? last - l->window + 1 : 0;
        attend(p->wide + r * wide + h * group * D, group, l->k_pool + h * m->head_stride, l->v_pool + h * m->head_stride,
               m->slot_stride, p->table + p->table_row[r] * p->table_width, first, last, D, m->scale, out, room);
        float *panel = p->panels + r / PANEL * PANEL * q + r % PANEL + h * group * D * PANEL;
        for (long i = 0; i < group * D; i++) panel[i * PANEL] = out[i];
    }
}

static void forward_task(void *given, int rank, int count) {
    const Pass *p = given;
    const Model *m = p->model;
    long H = m->hidden, rows = p->rows, q = m->heads * m->dim, wide = q + 2 * m->kv_heads * m->dim, I = m->inner, start, stop;
#define COLUMNS(N, K, weight, bias, add, out, M)                                                                     \
    share(N, COLUMN_UNIT, rank, count, &start, &stop);                                                                \
    gemm_columns(p->panels, M, weight, K, m->depth, bias, add, out, N, start, stop);                               \
    barrier(count)
    for (long r = rank; r < rows; r += count) memcpy(p->x + r * H, m->embedding + p->token_ids[r] * H, H * sizeof(float));
    barrier(count);
    for (long i = 0; i < m->num_layers; i++) {
        const Layer *l = m->layers + i;
        norms_to_panels(m, p, p->x, l->input_norm, 0, rows, 0, rank, count);
        barrier(count);
        COLUMNS(wide, H, l->qkv, l->qkv_bias, 0, p->wide, rows);
        attention_block(m, p, l, rank, count);
        barrier(count);
        COLUMNS(H, q, l->o, l->o_bias, 1, p->x, rows);
        norms_to_panels(m, p, p->x, l->post_norm, 0, rows, 0, rank, count);
        barrier(count);
        COLUMNS(2 * I, H, l->gate_up, l->gate_up_bias, 0, p->wide, rows);
        for (long r = rank; r < rows; r += count) {
            float *gate = p->wide + r * 2 * I;
            swiglu_row(gate, gate + I, gate, I);
            to_panel(p->panels, I, r, gate);
        }
        barrier(count);
        COLUMNS(H, I, l->down, l->down_bias, 1, p->x, rows);
    }
    if (!p->out_rows) norms_to_panels(m, p, p->x, m->norm, 0, rows, p->hidden, rank, count);
    else {
        for (long r = rank; r < rows; r += count) norm_row(p->x + r * H, m->norm, p->hidden + r * H, H, m->eps);
        barrier(count);
        norms_to_panels(m, p, p->hidden, 0, p->out_rows, p->num_out, 0, rank, count);
    }
    barrier(count);
    if (!p->num_out) return;
    COLUMNS(m->vocab, H, m->head, 0, 0, p->logits, p->num_out);
#undef COLUMNS
}

/* Runs the pass on `threads` ranks. Panels of the last, partly filled block hold finite leftovers, which no result reads. */
EXPORT void mk_forward(Pass *pass, int threads) { run(forward_task, pass, threads); }

#endif
