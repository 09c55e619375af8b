// Forward pass of the scan: a task walks over the chunks with its heads' states in cache.
#include "scan.h"

namespace {

using namespace scan;

template <class T>
struct Arguments : Inputs<T> {
  const wide<T>* initial;
  T* y;
  wide<T>*last, *kept;
};

template <class T>
class Forward {
  using W = wide<T>;

 public:
  Forward(const Arguments<T>& arguments, const Task& task)
      : to(arguments), s(arguments.shape), at(task), n(padded<W>(s.state)), p(padded<W>(s.channels)),
        arena(3 * CHUNK * n + 2 * TILE + 3 * CHUNK * p + at.heads * n * p) {
    b = arena.take(CHUNK * n);
    c = arena.take(CHUNK * n);
    b_transposed = arena.take(n * CHUNK);
    scores = arena.take(TILE);
    weights = arena.take(TILE);
    x = arena.take(CHUNK * p);
    weighted = arena.take(CHUNK * p);
    y = arena.take(CHUNK * p);
    states = arena.take(at.heads * n * p);
  }

  void run() {
    const std::int32_t* index = to.documents ? to.documents + at.sample * s.length : nullptr;
    i64 head_state = s.channels * s.state;
    for (i64 h = 0; h < at.heads; h++) {
      i64 head = at.sample * s.heads + at.first_head + h;
      load_state(to.initial ? to.initial + head * head_state : nullptr, s.channels, s.state, states + h * n * p, n, p);
    }
    for (i64 chunk = 0; chunk < s.chunks(); chunk++) {
      if (to.kept && chunk % SEGMENT == 0) keep_states(chunk / SEGMENT);
      i64 begin = chunk * CHUNK, tokens = std::min(CHUNK, s.length - begin);
      Documents documents(index, begin, tokens);
      load(to.b + at.sample * s.b_batch + begin * s.b_token + at.group * s.state, s.b_token, tokens, s.state, b, n);
      load(to.c + at.sample * s.c_batch + begin * s.c_token + at.group * s.state, s.c_token, tokens, s.state, c, n);
      transpose<W>(CHUNK, n, b, n, b_transposed, CHUNK);
      lower_product(n, c, b_transposed, scores);
      for (i64 h = 0; h < at.heads; h++) head_chunk(at.first_head + h, begin, tokens, documents, states + h * n * p);
    }
    for (i64 h = 0; h < at.heads; h++)
      store_state(states + h * n * p, p, s.channels, s.state,
                  to.last + (at.sample * s.heads + at.first_head + h) * head_state);
  }

 private:
  void keep_states(i64 segment) {
    i64 first = (at.sample * s.segments() + segment) * s.heads + at.first_head;
    std::memcpy(to.kept + first * n * p, states, sizeof(W) * at.heads * n * p);
  }

  void head_chunk(i64 head, i64 begin, i64 tokens, const Documents& documents, W* state) {
    Decay<W> decay;
    decay.prepare(to.dt + (at.sample * s.length + begin) * s.heads + head, s.heads, tokens, to.a[head], documents);
    load(to.x + at.sample * s.x_batch + begin * s.x_token + head * s.channels, s.x_token, tokens, s.channels, x, p);
    gemm<W>(CHUNK, p, n, c, n, 1, state, p, y, p, false);
    scale_rows(y, p, decay.from_start, y);
    decay.fill(weights, documents);
    for (i64 strip = 0; strip < CHUNK; strip += STRIP)
      for (i64 q = strip; q < strip + STRIP; q++)
        for (i64 k = 0; k < strip + STRIP; k++) weights[q * CHUNK + k] *= scores[q * CHUNK + k];
    scale_rows(x, p, decay.dt, weighted);
    lower_times(p, weights, weighted, y);
    if (to.d)
      for (i64 i = 0; i < CHUNK * p; i++) y[i] += to.d[head] * x[i];
    store(y, p, tokens, s.channels,
          to.y + at.sample * s.y_batch + begin * s.y_token + head * s.channels, s.y_token);
    advance(decay, b, x, n, p, weighted, state);
  }

  const Arguments<T>& to;
  const Shape& s;
  Task at;
  i64 n, p;
  Arena<W> arena;
  W *b, *c, *b_transposed, *scores, *weights, *x, *weighted, *y, *states;
};

template <class T>
void forward(const void* shape, const void* x, const void* dt, const void* a, const void* b, const void* c,
             const void* d, const void* initial, const void* documents, void* y, void* last, void* kept, i64 threads) {
  using W = wide<T>;
  Arguments<T> arguments{{shape, x, dt, a, b, c, d, documents},
                         static_cast<const W*>(initial),
                         static_cast<T*>(y),
                         static_cast<W*>(last),
                         static_cast<W*>(kept)};
  const Shape& s = arguments.shape;
  i64 tasks = s.batch * s.groups * s.blocks();
  parallel(tasks, threads, [&](i64 task) { Forward<T>(arguments, Task(s, task)).run(); });
}

}  // namespace

extern "C" {

// Elements of one head's kept state: padded state times padded channels.
i64 scan_state_size(i64 dtype, i64 state, i64 channels) {
  return dtype == DOUBLE ? padded<double>(state) * padded<double>(channels)
                         : padded<float>(state) * padded<float>(channels);
}

i64 scan_segments(i64 length) { return (length + CHUNK * SEGMENT - 1) / (CHUNK * SEGMENT); }

// shape: scan::Shape. x, b, c, y: the dtype, by the strides of shape. dt [batch, length, heads], a, d [heads],
// initial, last [batch, heads, channels, state]: wide. documents [batch, length] int32. kept
// [batch, segments, heads, state size]: wide, states at the segments' starts for the backward pass. d, initial,
// documents and kept may be null.
void scan_forward(i64 dtype, const void* shape, const void* x, const void* dt, const void* a, const void* b,
                  const void* c, const void* d, const void* initial, const void* documents, void* y, void* last,
                  void* kept, i64 threads) {
  DISPATCH(dtype, forward, shape, x, dt, a, b, c, d, initial, documents, y, last, kept, threads);
}
}
