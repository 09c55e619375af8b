// Causal attention with grouped queries and documents, a tile of scores at a time (Dao et al. 2022): shapes and tiles.
//
// Tiles of heads are [tokens, width] in the wide type, padded with zeros; a tile of scores is [QUERIES, KEYS].
#pragma once

#include <limits>

#include "gemm.h"

namespace attention {

constexpr i64 QUERIES = 64;
constexpr i64 KEYS = 64;
constexpr i64 TASKS = 16;  // that the backward pass has at least, if there are as many blocks of keys

// Strides in elements; the dimensions of a head are contiguous.
struct Strides {
  i64 token, sample, head;

  i64 at(i64 of_token, i64 of_sample, i64 of_head) const {
    return of_token * token + of_sample * sample + of_head * head;
  }
};

// Sizes and strides in the order of attention.py. Query i stands where key i + offset does.
struct Shape {
  i64 batch, heads, groups, length, key_length, dim, offset;
  Strides query, key, value;

  i64 heads_per_group() const { return heads / groups; }
  i64 query_blocks() const { return (length + QUERIES - 1) / QUERIES; }
  i64 key_blocks() const { return (key_length + KEYS - 1) / KEYS; }
  Range queries(i64 block) const { return {block * QUERIES, std::min(length, (block + 1) * QUERIES)}; }
  Range keys(i64 block) const { return {block * KEYS, std::min(key_length, (block + 1) * KEYS)}; }
  // Of outputs and gradients, which are contiguous.
  Strides dense(i64 heads_of_it) const { return {batch * heads_of_it * dim, heads_of_it * dim, dim}; }
  // Tasks that the backward pass deals out the blocks of keys of a head to; sums depend on it, so it on the shape only.
  i64 segments() const { return std::max<i64>(1, std::min(TASKS / std::max<i64>(1, batch * heads), key_blocks())); }
};

// The keys that queries see: from the first of their document up to themselves.
struct Visible {
  const Shape& shape;
  const std::int32_t* starts;  // first key [batch, length], non-decreasing in the second; null for 0

  Range of(i64 sample, i64 query) const {
    i64 begin = starts ? starts[sample * shape.length + query] : 0;
    return {begin, std::max(begin, std::min(query + shape.offset + 1, shape.key_length))};
  }
  // From the first to the last key that any of the queries sees.
  Range of(i64 sample, Range queries) const {
    return {of(sample, queries.begin).begin, of(sample, queries.end - 1).end};
  }
  // As columns of the tile that begins at key `first`; begin >= end if there are none.
  Range columns(i64 sample, i64 query, i64 first, i64 count) const {
    Range seen = of(sample, query);
    return {std::max<i64>(seen.begin - first, 0), std::min(seen.end - first, count)};
  }
};

// tile[rows, width] = factor times `tokens` rows of one head; what lies outside is zero.
template <class T, class W>
inline void load(const T* source, i64 token_stride, i64 tokens, i64 dim, W factor, W* tile, i64 rows, i64 width) {
  for (i64 i = 0; i < tokens; i++) {
    for (i64 j = 0; j < dim; j++) tile[i * width + j] = factor * widen(source[i * token_stride + j]);
    std::fill(tile + i * width + dim, tile + (i + 1) * width, W(0));
  }
  std::fill(tile + tokens * width, tile + rows * width, W(0));
}

// Scores outside `seen` become those of weight 0.
template <class W>
inline void hide(W* scores, Range seen, i64 columns) {
  constexpr W NONE = -std::numeric_limits<W>::infinity();
  std::fill(scores, scores + seen.begin, NONE);
  std::fill(scores + seen.end, scores + columns, NONE);
}

}  // namespace attention
