// The sequences of a call: how many rows they have, in which order kernels work on them, and where arrays have them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace rnnkern {

class Sequences {
 public:
  // Every sequence has all steps. `grain`: how many rows of a step lie together in what is saved.
  Sequences(std::int64_t steps, std::int64_t batch, std::int64_t grain = 1)
      : steps_(batch > 0 ? steps : 0),  // without rows there may be any number, which would be walked all the same
        batch_(batch),
        count_(steps_ * batch),
        given_count_(count_),
        saved_count_(steps_ * round_up(batch, grain)),
        grain_(grain) {}

  // Sequences of these lengths [B], each in an array (T, B, ..).
  static Sequences padded(const std::int64_t* lengths, std::int64_t steps, std::int64_t batch, std::int64_t grain) {
    std::vector<std::int64_t> own(lengths, lengths + batch);
    for (const std::int64_t length : own)
      if (length < 0 || length > steps)
        throw std::invalid_argument("lengths: expected 0 <= length <= " + std::to_string(steps) + ", got " +
                                    std::to_string(length));
    Sequences rows(own, grain);
    rows.padded_ = batch > 0 ? steps : 0;
    rows.given_count_ = rows.padded_ * batch;
    return rows;
  }

  // Sequences one behind the other: b has the rows offsets[b] to offsets[b + 1] of `count`. offsets [B + 1]
  static Sequences packed(const std::int64_t* offsets, std::int64_t batch, std::int64_t count, std::int64_t grain) {
    const std::vector<std::int64_t> own(offsets, offsets + batch + 1);
    if (own.front() != 0 || own.back() != count || !std::ranges::is_sorted(own))
      throw std::invalid_argument("offsets: expected 0, then values that do not fall, up to " + std::to_string(count));
    std::vector<std::int64_t> lengths;
    for (std::size_t b = 0; b + 1 < own.size(); ++b) lengths.push_back(own[b + 1] - own[b]);
    Sequences rows(lengths, grain);
    for (std::int64_t b = 0; b < batch; ++b) rows.at(kBases)[b] = own[static_cast<std::size_t>(rows.at(kOrder)[b])];
    rows.packed_ = true;
    return rows;
  }

  // The rows of a step one behind the other, of sequences in the order of their lengths: sizes[t] of step t.
  static Sequences sorted(const std::int64_t* sizes, std::int64_t steps, std::int64_t count, std::int64_t grain) {
    const std::vector<std::int64_t> own(sizes, sizes + steps);
    const bool falls = std::ranges::is_sorted(own, std::greater<>()) && (own.empty() || own.back() > 0);
    if (!falls || own.empty() || own.front() > count || std::reduce(own.begin(), own.end()) != count)
      throw std::invalid_argument("sizes: expected positive values that do not rise, with a sum of " +
                                  std::to_string(count));
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(own.front()));
    for (const std::int64_t size : own)
      for (std::int64_t b = 0; b < size; ++b) ++lengths[static_cast<std::size_t>(b)];
    return Sequences(lengths, grain);
  }

  std::int64_t steps() const { return steps_; }  // of the longest
  std::int64_t batch() const { return batch_; }
  std::int64_t count() const { return count_; }              // of rows that sequences have
  std::int64_t given_count() const { return given_count_; }  // of rows of the caller's arrays
  std::int64_t saved_count() const { return saved_count_; }  // of rows in what is saved, in whole grains

  RowMap given() const {
    if (padded_) return {batch_, nullptr, at(kOrder), padded_};
    if (packed_) return {1, nullptr, at(kBases), 0};
    return kept();
  }
  RowMap kept() const { return {batch_, tables_.empty() ? nullptr : at(kStarts), nullptr, 0}; }
  RowMap saved() const {
    return {round_up(batch_, grain_), tables_.empty() ? nullptr : at(grain_ > 1 ? kSaved : kStarts), nullptr, 0};
  }

  // The call keeps pointers to this object's tables.
  void describe(KernelCall& call) const {
    call.steps = steps_, call.batch = batch_, call.rows = count_;
    call.given = given(), call.kept = kept(), call.saved = saved();
    if (tables_.empty()) return;
    call.lengths = at(kLengths), call.starts = at(kStarts);
    call.order = at(kOrder), call.sorted = at(kSorted);
  }

 private:
  // Tables of B elements, the last two of T + 1: the fallen lengths, which b of the caller's is where and the other
  // way, the first rows of packed sequences, the rows before each step, and the same in what is saved.
  enum Table : std::int64_t { kLengths, kOrder, kSorted, kBases, kStarts, kSaved };

  static std::int64_t round_up(std::int64_t count, std::int64_t grain) { return (count + grain - 1) / grain * grain; }
  std::int64_t* at(Table table) { return tables_.data() + place(table); }
  const std::int64_t* at(Table table) const { return tables_.data() + place(table); }
  std::int64_t place(Table table) const { return table * batch_ + (table == kSaved ? steps_ + 1 - batch_ : 0); }

  Sequences(const std::vector<std::int64_t>& lengths, std::int64_t grain)
      : Sequences(lengths.empty() ? 0 : std::ranges::max(lengths), static_cast<std::int64_t>(lengths.size()), grain) {
    tables_.resize(static_cast<std::size_t>(4 * batch_ + 2 * (steps_ + 1)));
    const auto length = [&](std::int64_t b) { return lengths[static_cast<std::size_t>(b)]; };
    std::int64_t* const order = at(kOrder);
    std::iota(order, order + batch_, 0);
    std::stable_sort(order, order + batch_, [&](std::int64_t a, std::int64_t b) { return length(a) > length(b); });
    std::int64_t *const starts = at(kStarts), *const saved = at(kSaved);
    std::int64_t active = batch_;
    for (std::int64_t b = 0; b < batch_; ++b) at(kLengths)[b] = length(order[b]), at(kSorted)[order[b]] = b;
    for (std::int64_t t = 0; t < steps_; ++t) {
      while (at(kLengths)[active - 1] <= t) --active;
      starts[t + 1] = starts[t] + active;
      saved[t + 1] = saved[t] + round_up(active, grain_);
    }
    count_ = given_count_ = starts[steps_], saved_count_ = saved[steps_];
  }

  std::int64_t steps_, batch_, count_, given_count_, saved_count_, grain_;
  std::int64_t padded_ = 0;  // steps of the caller's arrays, where those go on past the ends of the sequences
  bool packed_ = false;
  std::vector<std::int64_t> tables_;  // empty where every sequence has all steps
};

}  // namespace rnnkern
