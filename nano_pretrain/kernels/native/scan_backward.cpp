// Backward pass of the scan: segments from last to first; in each the states are computed again from the kept one.
#include "scan.h"

namespace {

using namespace scan;

template <class T>
struct Arguments : Inputs<T> {
  const wide<T>* kept;
  const T* dy;
  const wide<T>* dlast;
  T* dx;
  wide<T>*db, *dc, *ddt, *da, *dd, *dinitial;
};

// Inner products of one token's rows.
template <class W>
struct Products {
  W weights, state, skip;
};

// dx = dt (dx + to_end through_state) + skip dy, where dx comes in through the weights; and the products with x.
template <class W>
inline Products<W> combine(W dt, W to_end, W skip, const W* __restrict x, const W* __restrict dy,
                           const W* __restrict through_state, W* __restrict dx, i64 p) {
  W by_weights = 0, by_state = 0, by_skip = 0;
#pragma omp simd reduction(+ : by_weights, by_state, by_skip)
  for (i64 j = 0; j < p; j++) {
    by_weights += dx[j] * x[j];
    by_state += through_state[j] * x[j];
    by_skip += dy[j] * x[j];
    dx[j] = dt * (dx[j] + to_end * through_state[j]) + skip * dy[j];
  }
  return {by_weights, by_state, by_skip};
}

// Row q of weights = scores o decay (`weights` comes in as the decay): adds to dscores, and the gradient of each decay's
// exponent to `later`, where the token is k; returns its sum, for the token q. The diagonal does not decay: what it
// would add to both cancels, but not to the last bit.
template <class W>
inline W through_weights(i64 q, i64 columns, const W* __restrict dt, const W* __restrict scores,
                         const W* __restrict dweights, W* __restrict weights, W* __restrict dscores,
                         W* __restrict later) {
  W total = 0;
#pragma omp simd reduction(+ : total)
  for (i64 k = 0; k < columns; k++) {
    W ddecayed = dweights[k] * dt[k] * weights[k];
    weights[k] *= scores[k];
    W dexponent = k < q ? ddecayed * scores[k] : W(0);
    total += dexponent;
    later[k] += dexponent;
    dscores[k] += ddecayed;
  }
  return total;
}

template <class W>
inline void accumulate(const W* __restrict dc_head, const W* __restrict c, W* __restrict by_row, W* __restrict dc) {
#pragma omp simd
  for (i64 q = 0; q < CHUNK; q++) {
    by_row[q] += dc_head[q] * c[q];
    dc[q] += dc_head[q];
  }
}

// dstate *= keep; returns keep <dstate, state>.
template <class W>
inline W decayed(i64 count, W keep, const W* __restrict state, W* __restrict dstate) {
  W product = 0;
#pragma omp simd reduction(+ : product)
  for (i64 i = 0; i < count; i++) {
    dstate[i] *= keep;
    product += dstate[i] * state[i];
  }
  return product;
}

template <class T>
class Backward {
  using W = wide<T>;

 public:
  Backward(const Arguments<T>& arguments, const Task& task)
      : to(arguments), s(arguments.shape), at(task), n(padded<W>(s.state)), p(padded<W>(s.channels)),
        index(to.documents ? to.documents + at.sample * s.length : nullptr),
        arena(9 * CHUNK * n + 4 * TILE + 8 * CHUNK * p + at.heads * (SEGMENT + 1) * n * p) {
    for (W** tile : {&b, &b_transposed, &c, &c_transposed, &db_transposed, &dc_transposed, &db, &dc, &head_transposed})
      *tile = arena.take(CHUNK * n);
    for (W** tile : {&scores, &dscores, &weights, &dweights}) *tile = arena.take(TILE);
    for (W** tile : {&x, &x_transposed, &dy, &dy_weighted, &dy_transposed, &dx, &through_state, &scratch})
      *tile = arena.take(CHUNK * p);
    before = arena.take(at.heads * SEGMENT * n * p);
    dstate = arena.take(at.heads * n * p);
    da.assign(at.heads, 0);
    dd.assign(at.heads, 0);
  }

  void run() {
    for (i64 h = 0; h < at.heads; h++)
      load_state(to.dlast ? to.dlast + head_of_sample(h) * s.channels * s.state : nullptr, s.channels, s.state,
                 dstate + h * n * p, n, p);
    for (i64 segment = s.segments() - 1; segment >= 0; segment--) {
      i64 first = segment * SEGMENT, end = std::min(s.chunks(), first + SEGMENT);
      recompute_states(segment, first, end);
      for (i64 chunk = end - 1; chunk >= first; chunk--) chunk_gradients(chunk, chunk - first);
    }
    for (i64 h = 0; h < at.heads; h++) {
      store_state(dstate + h * n * p, p, s.channels, s.state,
                  to.dinitial ? to.dinitial + head_of_sample(h) * s.channels * s.state : nullptr);
      to.da[head_of_sample(h)] = W(da[h]);
      to.dd[head_of_sample(h)] = W(dd[h]);
    }
  }

 private:
  i64 head_of_sample(i64 h) const { return at.sample * s.heads + at.first_head + h; }
  i64 tokens_from(i64 begin) const { return std::min(CHUNK, s.length - begin); }
  W* state_before(i64 h, i64 chunk_in_segment) const { return before + (h * SEGMENT + chunk_in_segment) * n * p; }

  void load_b(i64 begin) {
    load(to.b + at.sample * s.b_batch + begin * s.b_token + at.group * s.state, s.b_token, tokens_from(begin), s.state,
         b, n);
  }
  void load_x(i64 h, i64 begin) {
    load(to.x + at.sample * s.x_batch + begin * s.x_token + (at.first_head + h) * s.channels, s.x_token,
         tokens_from(begin), s.channels, x, p);
  }
  Decay<W> decay_of(i64 h, i64 begin, const Documents& documents) const {
    Decay<W> decay;
    decay.prepare(to.dt + (at.sample * s.length + begin) * s.heads + at.first_head + h, s.heads, tokens_from(begin),
                  to.a[at.first_head + h], documents);
    return decay;
  }

  void recompute_states(i64 segment, i64 first, i64 end) {
    const W* kept = to.kept + ((at.sample * s.segments() + segment) * s.heads + at.first_head) * n * p;
    for (i64 h = 0; h < at.heads; h++) std::memcpy(state_before(h, 0), kept + h * n * p, sizeof(W) * n * p);
    for (i64 chunk = first; chunk + 1 < end; chunk++) {
      i64 begin = chunk * CHUNK;
      Documents documents(index, begin, tokens_from(begin));
      load_b(begin);
      for (i64 h = 0; h < at.heads; h++) {
        load_x(h, begin);
        W* next = state_before(h, chunk - first + 1);
        std::memcpy(next, state_before(h, chunk - first), sizeof(W) * n * p);
        advance(decay_of(h, begin, documents), b, x, n, p, scratch, next);
      }
    }
  }

  void chunk_gradients(i64 chunk, i64 in_segment) {
    i64 begin = chunk * CHUNK, tokens = tokens_from(begin);
    Documents documents(index, begin, tokens);
    load_b(begin);
    load(to.c + at.sample * s.c_batch + begin * s.c_token + at.group * s.state, s.c_token, tokens, s.state, c, n);
    transpose<W>(CHUNK, n, b, n, b_transposed, CHUNK);
    transpose<W>(CHUNK, n, c, n, c_transposed, CHUNK);
    lower_product(n, c, b_transposed, scores);
    std::fill(dscores, dscores + TILE, W(0));
    std::fill(db_transposed, db_transposed + n * CHUNK, W(0));
    std::fill(dc_transposed, dc_transposed + n * CHUNK, W(0));
    for (i64 h = 0; h < at.heads; h++) head_gradients(h, begin, tokens, documents, state_before(h, in_segment));
    // Through the scores: dC += dS B, dB += dS^T C.
    transpose<W>(n, CHUNK, dc_transposed, CHUNK, dc, n);
    lower_times(n, dscores, b, dc);
    transpose<W>(n, CHUNK, db_transposed, CHUNK, db, n);
    lower_transposed_times(n, dscores, c, db, true);
    i64 row = s.groups * s.state;
    i64 offset = ((at.block * s.batch + at.sample) * s.length + begin) * row + at.group * s.state;
    store(dc, n, tokens, s.state, to.dc + offset, row);
    store(db, n, tokens, s.state, to.db + offset, row);
  }

  void head_gradients(i64 h, i64 begin, i64 tokens, const Documents& documents, const W* state) {
    i64 head = at.first_head + h;
    W* dnext = dstate + h * n * p;  // gradient of the state after the chunk; in the end, of the one before it
    Decay<W> decay = decay_of(h, begin, documents);
    load_x(h, begin);
    load(to.dy + at.sample * s.y_batch + begin * s.y_token + head * s.channels, s.y_token, tokens, s.channels, dy, p);
    transpose<W>(CHUNK, p, x, p, x_transposed, CHUNK);

    W dsum[CHUNK] = {}, ddt[CHUNK] = {};  // of the decays' exponents, and of dt itself
    weights_gradient(decay, documents, dsum);
    W dtotal = state_gradients(decay, state, dnext, dsum);
    W skip = to.d ? to.d[head] : W(0);
    for (i64 k = 0; k < CHUNK; k++) {
      Products<W> row = combine(decay.dt[k], decay.to_end[k], skip, x + k * p, dy + k * p, through_state + k * p,
                                dx + k * p, p);
      W by_state = row.state * decay.to_end[k];
      ddt[k] = row.weights + by_state;
      dsum[k] -= decay.dt[k] * by_state;
      dtotal += decay.dt[k] * by_state;
      dd[h] += row.skip;
    }
    dsum[CHUNK - 1] += dtotal;
    store(dx, p, tokens, s.channels,
          to.dx + at.sample * s.dx_batch + begin * s.dx_token + head * s.channels, s.dx_token);
    // sum_q = a (dt_0 + ... + dt_q): from the last token back.
    W* out = to.ddt + (at.sample * s.length + begin) * s.heads + head;
    W later = 0;
    for (i64 q = CHUNK - 1; q >= 0; q--) {
      later += dsum[q];
      // Nothing before this token is seen after it: what is left is rounding, which dt would multiply.
      bool starts = documents.first[q] == q && (!documents.sees_state(q) || (begin == 0 && !to.dinitial));
      if (starts || vanishes(decay.dt[q] * to.a[head])) later = 0;
      da[h] += decay.dt[q] * later;
      if (q < tokens) out[q * s.heads] = ddt[q] + to.a[head] * later;
    }
  }

  // Within the chunk, y = (scores o decay) diag(dt) x: dscores, dx without its factor dt, and dsum.
  void weights_gradient(const Decay<W>& decay, const Documents& documents, W* dsum) {
    decay.fill(weights, documents);
    lower_product(p, dy, x_transposed, dweights);
    W later[CHUNK] = {};
    for (i64 q = 0; q < CHUNK; q++)
      dsum[q] += through_weights(q, q / STRIP * STRIP + STRIP, decay.dt, scores + q * CHUNK, dweights + q * CHUNK,
                                 weights + q * CHUNK, dscores + q * CHUNK, later);
    for (i64 k = 0; k < CHUNK; k++) dsum[k] -= later[k];
    lower_transposed_times(p, weights, dy, dx, false);
  }

  // Through the states: dB and dC, the state's own gradient, through_state = B dstate, dsum at the rows. Returns the
  // gradient of the exponent of `keep`.
  W state_gradients(const Decay<W>& decay, const W* state, W* dnext, W* dsum) {
    W factors[CHUNK], by_row[CHUNK] = {};
    gemm<W>(CHUNK, p, n, b, n, 1, dnext, p, through_state, p, false);
    for (i64 k = 0; k < CHUNK; k++) factors[k] = decay.dt[k] * decay.to_end[k];
    scale_columns(x_transposed, factors);
    gemm<W>(n, CHUNK, p, dnext, p, 1, x_transposed, CHUNK, db_transposed, CHUNK, true);
    scale_rows(dy, p, decay.from_start, dy_weighted);
    transpose<W>(CHUNK, p, dy_weighted, p, dy_transposed, CHUNK);
    gemm<W>(n, CHUNK, p, state, p, 1, dy_transposed, CHUNK, head_transposed, CHUNK, false);
    for (i64 j = 0; j < n; j++)
      accumulate(head_transposed + j * CHUNK, c_transposed + j * CHUNK, by_row, dc_transposed + j * CHUNK);
    for (i64 q = 0; q < CHUNK; q++) dsum[q] += by_row[q];
    W kept = decayed(n * p, decay.keep, state, dnext);
    gemm<W>(n, p, CHUNK, c, 1, n, dy_weighted, p, dnext, p, true);
    return kept;
  }

  void scale_columns(W* transposed, const W* factors) {
    for (i64 j = 0; j < p; j++)
      for (i64 k = 0; k < CHUNK; k++) transposed[j * CHUNK + k] *= factors[k];
  }

  const Arguments<T>& to;
  const Shape& s;
  Task at;
  i64 n, p;
  const std::int32_t* index;
  Arena<W> arena;
  W *b, *b_transposed, *c, *c_transposed, *db_transposed, *dc_transposed, *db, *dc, *head_transposed;
  W *scores, *dscores, *weights, *dweights;
  W *x, *x_transposed, *dy, *dy_weighted, *dy_transposed, *dx, *through_state, *scratch;
  W *before, *dstate;
  std::vector<double> da, dd;  // sums over the whole sequence
};

template <class T>
void backward(const void* shape, const void* x, const void* dt, const void* a, const void* b, const void* c,
              const void* d, const void* documents, const void* kept, const void* dy, const void* dlast, void* dx,
              void* ddt, void* da, void* db, void* dc, void* dd, void* dinitial, i64 threads) {
  using W = wide<T>;
  Arguments<T> arguments{{shape, x, dt, a, b, c, d, documents},
                         static_cast<const W*>(kept),
                         static_cast<const T*>(dy),
                         static_cast<const W*>(dlast),
                         static_cast<T*>(dx),
                         static_cast<W*>(db),
                         static_cast<W*>(dc),
                         static_cast<W*>(ddt),
                         static_cast<W*>(da),
                         static_cast<W*>(dd),
                         static_cast<W*>(dinitial)};
  const Shape& s = arguments.shape;
  i64 tasks = s.batch * s.groups * s.blocks();
  parallel(tasks, threads, [&](i64 task) { Backward<T>(arguments, Task(s, task)).run(); });
}

}  // namespace

extern "C" {

// As scan_forward; dy has the strides of y. ddt [batch, length, heads], da, dd [batch, heads], dinitial
// [batch, heads, channels, state]: wide; db, dc [blocks, batch, length, groups, state]: wide, to be summed over the
// blocks of heads. d, documents, dlast and dinitial may be null.
void scan_backward(i64 dtype, const void* shape, const void* x, const void* dt, const void* a, const void* b,
                   const void* c, const void* d, const void* documents, const void* kept, const void* dy,
                   const void* dlast, void* dx, void* ddt, void* da, void* db, void* dc, void* dd, void* dinitial,
                   i64 threads) {
  DISPATCH(dtype, backward, shape, x, dt, a, b, c, d, documents, kept, dy, dlast, dx, ddt, da, db, dc, dd, dinitial,
           threads);
}
}
