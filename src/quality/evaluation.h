// One evaluation: a checkpoint, arms, text and tasks; units of work that are kept in a journal.
//
// text   Windows of the text stream, all arms in lockstep: every arm decodes the same tokens, a few
//        at a time, from its own cache, and its logits are compared with a1's at once; nothing but
//        sums is kept. Nothing is predicted by a naive prefill: a prompt only fills the cache.
// tasks  Items, arm by arm. Every answer token has to be the argmax after the reference's tokens
//        before it. Up to the first mismatch that is what greedy decoding does; after it the item
//        is wrong either way, so feeding the reference goes on costs nothing and tells about later
//        answers.
//
// attention  Rows of synthetic attention of a given length: the sums of PV by themselves.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quality/arms.h"
#include "quality/items.h"
#include "quality/journal.h"
#include "quality/lab.h"

namespace snapmla::quality {

struct Settings {
  std::string model_dir, device = "auto";
  int threads = 0;
  std::vector<std::string> arms = {"main"};
  std::string text_file;                // may be empty: no text metrics, no fills
  std::vector<std::string> item_files;  // may be empty: no tasks
  std::vector<std::int64_t> contexts;   // lengths of text windows, tokens
  std::int64_t text_tokens = 0;         // per context, in windows spread over the text; 0: all
  std::int64_t score = 0;               // last tokens of a window that count; 0: all but the first
  std::vector<std::int64_t> attention;  // tokens of synthetic rows; empty: none
  std::int64_t items = 0;               // per kind and size; 0: all there are
  int text_step = 16;                   // tokens per decode step of text, 1..16
  int answer_step = 1;                  // tokens per decode step inside answers, 1..16
  bool prompts_by_decode = false;       // what comes before is fed through decode, not prefill
  std::int64_t batch_tokens = 8192;     // tokens that an arm's cache has room for at a time
  std::int64_t max_model_len = 0;       // 0: the checkpoint's
  std::string out_dir;                  // for the journal; must exist
};

class Evaluation {
 public:
  using Json = Journal::Json;
  // done and total are in units of work, of no particular size; false stops at once, without the
  // unit that is being worked on.
  using Progress = std::function<bool(double done, double total, const std::string& what)>;

  // Loads checkpoint, text and items, and what an earlier run with the same settings did. Throws
  // kInvalidArgument and what loading throws.
  explicit Evaluation(Settings settings,
                      const std::function<void(std::int64_t, std::int64_t)>& on_load = {});
  ~Evaluation();

  // Runs what is not done yet. False when progress stopped it.
  bool run(const Progress& progress);
  bool finished() const;

  // Everything that the units have shown so far (quality/report.h makes tables of it).
  Json report() const;

 private:
  struct Unit;
  struct Stopped {};
  // How much of a unit is done; throws Stopped.
  class Meter;

  void plan_text();
  void plan_tasks();
  void plan_attention();
  Json settings_json() const;
  void make_models();
  Json run_text(const Unit& unit, Meter& meter);
  Json run_tasks(const Unit& unit, Meter& meter);
  Json run_attention(const Unit& unit, Meter& meter);

  Settings settings_;
  std::vector<Arm> arms_;
  std::unique_ptr<Lab> lab_;
  std::vector<std::int32_t> text_, calibration_;
  std::vector<Item> items_;
  std::string text_print_, items_print_;
  std::int64_t max_len_ = 0, pool_tokens_ = kPageSize;
  std::vector<Unit> units_;
  std::unique_ptr<Journal> journal_;
  std::vector<std::unique_ptr<ArmModel>> models_;
};

}  // namespace snapmla::quality
