// The page allocator, copy-on-write, the prefix index, and a random walk over all of them.
#include "kv_cache/paged_cache.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>

#include "backends/ref/ref_backend.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

std::vector<std::int32_t> tokens(std::int64_t n, std::int32_t seed = 0) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<std::int32_t>(i * 7 + 3) + seed * 100000;
  return ids;
}

TEST(PageLayout, SwizzledImageIsAPermutationOfThePlane) {
  for (std::int64_t row_bytes : {128, 512, 1024, 2048}) {
    std::vector<int> seen(static_cast<std::size_t>(64 * row_bytes), 0);
    for (std::int64_t t = 0; t < 64; ++t) {
      for (std::int64_t b = 0; b < row_bytes; ++b) {
        ++seen.at(
            static_cast<std::size_t>(element_offset(PageImage::kSwizzled128, row_bytes, t, b)));
      }
    }
    for (int count : seen) ASSERT_EQ(count, 1);
  }
  EXPECT_EQ(element_offset(PageImage::kSwizzled128, 512, 1, 0), 128 + 16);
  EXPECT_EQ(element_offset(PageImage::kSwizzled128, 512, 9, 130), 8192 + 9 * 128 + 16 + 2);
}

TEST(PageAllocator, RefusesMisuse) {
  PageAllocator pages(2);
  const auto a = pages.allocate(), b = pages.allocate();
  EXPECT_FALSE(pages.allocate());
  pages.retain(*a);
  EXPECT_FALSE(pages.writable(*a));
  pages.release(*a);
  pages.release(*a);
  EXPECT_EQ(pages.num_free(), 1);
  EXPECT_THROW(pages.release(*a), Error);
  EXPECT_THROW(pages.retain(7), Error);
  pages.release(*b);
  EXPECT_EQ(pages.num_free(), 2);
}

TEST(SequencePages, ForkCopiesASharedPageBeforeWriting) {
  PagedCache cache(KvCacheFormat::kFp8, 2, 8);
  SequencePages a(cache);
  ASSERT_TRUE(a.extend(70));
  std::uint8_t* shared = cache.layer(1).latent_plane(a.table()[1]);
  shared[0] = 42;
  SequencePages b = a.fork();
  EXPECT_EQ(cache.allocator().num_used(), 2);
  ASSERT_TRUE(b.extend(1));
  EXPECT_EQ(a.table()[0], b.table()[0]);
  EXPECT_NE(a.table()[1], b.table()[1]);
  EXPECT_EQ(cache.layer(1).latent_plane(b.table()[1])[0], 42);
  EXPECT_EQ(b.slot(70), b.table()[1] * 64 + 6);
}

TEST(SequencePages, ExtendWithoutRoomChangesNothing) {
  PagedCache cache(KvCacheFormat::kBf16, 1, 2);
  SequencePages a(cache);
  ASSERT_TRUE(a.extend(100));
  EXPECT_FALSE(a.extend(29));
  EXPECT_EQ(a.length(), 100);
  EXPECT_TRUE(a.extend(28));
}

// Offsets past 2^31 and 2^32 bytes: the pool is reserved, and three of its pages are touched.
TEST(PagedCache, FarPagesKeepTheirTokens) {
  const std::int64_t pages = 120'000;  // 4.9 GB
  PagedCache cache(KvCacheFormat::kFp8, 1, pages);
  const auto ops = ref::make_ref_backend();
  for (std::int64_t page : {std::int64_t{0}, std::int64_t{58'254}, pages - 1}) {
    std::vector<float> latent(512, static_cast<float>(page % 7 + 1)), rope(64, 2.0f);
    std::vector<float> latent_out(512), rope_out(64);
    const std::vector<std::int64_t> slot = {page * 64 + 63};
    const std::vector<std::int32_t> table = {static_cast<std::int32_t>(page)};
    ops::append_kv(*ops,
                   {TensorView::of(latent.data(), {1, 512}), TensorView::of(rope.data(), {1, 64}),
                    TensorView::of(slot.data(), {1}), cache.layer(0)});
    ops::fetch_dequant(*ops, {cache.layer(0), TensorView::of(table.data(), {1}), 63, 64,
                              TensorView::of(latent_out.data(), {1, 512}),
                              TensorView::of(rope_out.data(), {1, 64})});
    EXPECT_EQ(latent_out, latent);
    EXPECT_NEAR(rope_out[5], 2.0f, 0.01f);
    const auto* base = cache.layer(0).latent;
    EXPECT_EQ(cache.layer(0).latent_plane(page) - base, page * 41216);
  }
}

TEST(PrefixIndex, FindsWholePagesOnlyAndComparesTokens) {
  PageAllocator pages(8);
  PrefixIndex index(pages,
                    [](std::int64_t, std::span<const std::int32_t>) -> std::uint64_t { return 1; });
  const std::vector<std::int32_t> a = tokens(200), b = tokens(200, 1);
  const std::vector<std::int32_t> own = {*pages.allocate(), *pages.allocate(), *pages.allocate(),
                                         *pages.allocate()};
  index.insert(a, own);
  EXPECT_EQ(index.size(), 3);  // the fourth page is not full
  EXPECT_EQ(index.acquire(a), (std::vector<std::int32_t>{own[0], own[1], own[2]}));
  EXPECT_TRUE(index.acquire(b).empty());  // the same hash, other tokens
  std::vector<std::int32_t> mixed = a;
  mixed[100] += 1;
  EXPECT_EQ(index.acquire(mixed).size(), 1u);
}

TEST(PrefixIndex, EvictsTheLeastRecentlyUsedLeafFirst) {
  PageAllocator pages(6);
  PrefixIndex index(pages);
  const auto take = [&pages](int n) {
    std::vector<std::int32_t> own;
    for (int i = 0; i < n; ++i) own.push_back(*pages.allocate());
    return own;
  };
  const auto give = [&pages](const std::vector<std::int32_t>& own) {
    for (std::int32_t page : own) pages.release(page);
  };
  const std::vector<std::int32_t> a = tokens(128), b = tokens(128, 1), c = tokens(64, 2);
  const auto pages_a = take(2), pages_b = take(2), pages_c = take(1);
  index.insert(a, pages_a);
  index.insert(b, pages_b);
  index.insert(c, pages_c);
  give(pages_a), give(pages_b), give(pages_c);
  EXPECT_EQ(pages.num_free(), 1);
  give(index.acquire(a));  // a was used last
  ASSERT_TRUE(index.evict_until_free(2));
  EXPECT_EQ(index.acquire(b).size(), 1u);  // b lost its tail, the only leaf that old
  pages.release(pages_b[0]);
  ASSERT_TRUE(index.evict_until_free(3));
  EXPECT_TRUE(index.acquire(c).empty());
  const auto held = index.acquire(a);
  EXPECT_EQ(held, pages_a);
  EXPECT_FALSE(index.evict_until_free(6));  // a's pages are in use
  EXPECT_EQ(pages.num_free(), 4);
  EXPECT_EQ(index.size(), 2);
  give(held);
  EXPECT_TRUE(index.evict_until_free(6));
  EXPECT_EQ(index.size(), 0);
}

TEST(PrefixIndex, TheSamePageOfTokensBehindAnotherPrefixIsAnother) {
  PageAllocator pages(4);
  PrefixIndex index(pages);
  std::vector<std::int32_t> a = tokens(128), b = tokens(128);
  std::fill_n(b.begin(), 64, 9);  // the second page alike, the first not
  index.insert(a, std::vector<std::int32_t>{*pages.allocate(), *pages.allocate()});
  EXPECT_TRUE(index.acquire(b).empty());
  EXPECT_TRUE(index.acquire(std::span(a).subspan(64)).empty());
  index.insert(b, std::vector<std::int32_t>{*pages.allocate(), *pages.allocate()});
  const auto found_a = index.acquire(a), found_b = index.acquire(b);
  EXPECT_EQ(found_a.size(), 2u);
  EXPECT_EQ(found_b.size(), 2u);
  EXPECT_NE(found_a[0], found_b[0]);
  EXPECT_NE(found_a[1], found_b[1]);
  EXPECT_EQ(index.size(), 4);
}

TEST(PrefixIndex, ASecondInsertKeepsTheFirstPages) {
  PageAllocator pages(4);
  PrefixIndex index(pages);
  const auto a = tokens(64);
  const std::int32_t first = *pages.allocate(), second = *pages.allocate();
  index.insert(a, std::vector<std::int32_t>{first});
  index.insert(a, std::vector<std::int32_t>{second});
  EXPECT_EQ(index.acquire(a), std::vector<std::int32_t>{first});
  EXPECT_EQ(pages.ref_count(second), 1);
  EXPECT_EQ(pages.ref_count(first), 3);
}

class CopyOnWrite : public testing::TestWithParam<unsigned> {};

// Forks, growth, truncation and reuse on a small pool; each sequence writes its own mark for every
// token in every layer, and must always read back its own marks.
TEST_P(CopyOnWrite, EverySequenceReadsWhatItWrote) {
  std::mt19937 rng(GetParam());
  const auto random = [&rng](std::int64_t n) {
    return static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(n));
  };
  PagedCache cache(KvCacheFormat::kFp8, 2, 24);
  struct Sequence {
    SequencePages pages;
    std::vector<std::uint8_t> marks;
  };
  std::vector<Sequence> alive;
  const auto at = [&](std::int64_t layer, const SequencePages& s, std::int64_t token) {
    const std::int64_t slot = s.slot(token);
    return cache.layer(layer).latent_plane(slot / 64) + (slot % 64) * 16;
  };
  int copies = 0;
  for (int step = 0; step < 300; ++step) {
    const std::int64_t what = random(10);
    if (alive.empty() || (what < 2 && alive.size() < 6)) {
      alive.push_back({SequencePages(cache), {}});
    } else if (what < 4 && alive.size() < 8) {
      const auto& parent = alive[static_cast<std::size_t>(random(std::ssize(alive)))];
      Sequence child{parent.pages.fork(), parent.marks};
      alive.push_back(std::move(child));
    } else if (what < 8) {
      Sequence& s = alive[static_cast<std::size_t>(random(std::ssize(alive)))];
      const std::int64_t count = random(90);
      const std::vector<std::int32_t> before(s.pages.table().begin(), s.pages.table().end());
      if (!s.pages.extend(count)) continue;
      for (std::size_t i = 0; i < before.size(); ++i) copies += before[i] != s.pages.table()[i];
      for (std::int64_t i = 0; i < count; ++i) {
        s.marks.push_back(static_cast<std::uint8_t>(rng()));
        for (std::int64_t layer = 0; layer < 2; ++layer)
          *at(layer, s.pages, std::ssize(s.marks) - 1) =
              static_cast<std::uint8_t>(s.marks.back() + layer);
      }
    } else if (what < 9) {
      Sequence& s = alive[static_cast<std::size_t>(random(std::ssize(alive)))];
      s.pages.truncate(random(s.pages.length() + 1));
      s.marks.resize(static_cast<std::size_t>(s.pages.length()));
    } else {
      std::vector<Sequence> rest;
      const std::int64_t gone = random(std::ssize(alive));
      for (std::int64_t i = 0; i < std::ssize(alive); ++i)
        if (i != gone) rest.push_back(std::move(alive[static_cast<std::size_t>(i)]));
      alive.swap(rest);
    }
    for (const Sequence& s : alive) {
      for (std::int64_t t = 0; t < std::ssize(s.marks); ++t) {
        for (std::int64_t layer = 0; layer < 2; ++layer)
          ASSERT_EQ(*at(layer, s.pages, t),
                    static_cast<std::uint8_t>(s.marks[static_cast<std::size_t>(t)] + layer))
              << "token " << t << " layer " << layer << " step " << step;
      }
    }
  }
  EXPECT_GT(copies, 0);
  alive.clear();
  EXPECT_EQ(cache.allocator().num_free(), 24);
}

INSTANTIATE_TEST_SUITE_P(Seeds, CopyOnWrite, testing::Range(0u, 60u));

// free + used = total, and every reference count equals the number of holders, after every step.
TEST(PagedCache, RandomWalkKeepsTheCounts) {
  const unsigned seed = 20260210;
  SCOPED_TRACE(seed);
  std::mt19937 engine(seed);
  const auto random = [&engine] { return static_cast<std::int64_t>(engine()); };
  PagedCache cache(KvCacheFormat::kFp8, 1, 40);
  std::vector<SequencePages> alive;
  std::vector<std::vector<std::int32_t>> ids;
  for (int step = 0; step < 20000; ++step) {
    const std::int64_t what = random() % 10;
    if (what < 3 && alive.size() < 8) {
      ids.push_back(tokens(1 + random() % 300, static_cast<std::int32_t>(random() % 3)));
      alive.emplace_back(cache);
      const std::int64_t length = static_cast<std::int64_t>(ids.back().size());
      const std::int64_t reused = alive.back().reuse_prefix(ids.back(), length - 1);
      ASSERT_EQ(reused % 64, 0);
      if (!alive.back().extend(length - reused)) {
        alive.pop_back();
        ids.pop_back();
      }
    } else if (!alive.empty()) {
      const auto i = static_cast<std::size_t>(random()) % alive.size();
      if (what < 5) {
        cache.prefix_index().insert(ids[i], alive[i].table());
      } else if (what < 7) {
        if (alive[i].extend(random() % 80))
          ids[i].resize(static_cast<std::size_t>(alive[i].length()), 5);
      } else if (what < 8) {
        const std::int64_t keep = random() % (alive[i].length() + 1);
        alive[i].truncate(keep);
        ids[i].resize(static_cast<std::size_t>(keep));
      } else {
        alive[i].clear();
        std::vector<SequencePages> rest;
        for (std::size_t j = 0; j < alive.size(); ++j) {
          if (j != i) rest.push_back(std::move(alive[j]));
        }
        alive.swap(rest);
        ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    std::map<std::int32_t, int> held;
    for (const SequencePages& s : alive) {
      for (std::int32_t page : s.table()) ++held[page];
    }
    std::int64_t listed = 0;
    for (std::int32_t page = 0; page < 40; ++page) {
      const int extra = cache.allocator().ref_count(page) - held[page];
      ASSERT_TRUE(extra == 0 || extra == 1) << "page " << page << " at step " << step;
      listed += extra;
    }
    ASSERT_EQ(listed, cache.prefix_index().size());
    ASSERT_EQ(cache.allocator().num_free() + cache.allocator().num_used(), 40);
  }
  alive.clear();
  EXPECT_TRUE(cache.prefix_index().evict_until_free(40));
}

}  // namespace
}  // namespace snapmla
