// generation_config.json: what is read, what is refused.
#include "model/generation_config.h"

#include <gtest/gtest.h>

#include "model/checkpoint_files.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

GenerationConfig read(const std::string& text) {
  const auto dir = testing_files::fresh_directory();
  testing_files::write_text(dir / "generation_config.json", text);
  return load_generation_config(dir);
}

TEST(GenerationConfig, AMissingFileGivesNothing) {
  const GenerationConfig c = load_generation_config(testing_files::fresh_directory());
  EXPECT_TRUE(c.eos_token_ids.empty());
  EXPECT_FALSE(c.temperature || c.top_p);
}

TEST(GenerationConfig, ReadsWhatIsThere) {
  EXPECT_EQ(read(R"({"eos_token_id": 5})").eos_token_ids, std::vector<std::int64_t>{5});
  EXPECT_EQ(read(R"({"eos_token_id": [1, 163586]})").eos_token_ids,
            (std::vector<std::int64_t>{1, 163586}));
  EXPECT_TRUE(read(R"({"eos_token_id": []})").eos_token_ids.empty());
  EXPECT_TRUE(read(R"({"eos_token_id": null, "top_p": null})").eos_token_ids.empty());
  const GenerationConfig c = read(R"({"temperature": 0.6, "top_p": 0.95, "do_sample": true})");
  EXPECT_EQ(c.temperature, 0.6);
  EXPECT_EQ(c.top_p, 0.95);
  EXPECT_EQ(read(R"({"temperature": 0})").temperature, 0.0);
}

class GenerationConfigRefused : public testing::TestWithParam<std::pair<const char*, const char*>> {
};

TEST_P(GenerationConfigRefused, NamesFileAndField) {
  try {
    read(GetParam().first);
    ADD_FAILURE() << "accepted " << GetParam().first;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidFile);
    const std::string message = e.what();
    EXPECT_NE(message.find("generation_config.json"), std::string::npos) << message;
    EXPECT_NE(message.find(GetParam().second), std::string::npos) << message;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Files, GenerationConfigRefused,
    testing::Values(std::pair{"{", "JSON"}, std::pair{"[]", ""}, std::pair{"3", ""},
                    std::pair{R"({"eos_token_id": "1"})", "eos_token_id"},
                    std::pair{R"({"eos_token_id": -1})", "eos_token_id"},
                    std::pair{R"({"eos_token_id": [1, null]})", "eos_token_id"},
                    std::pair{R"({"eos_token_id": [[1]]})", "eos_token_id"},
                    std::pair{R"({"eos_token_id": 1.5})", "eos_token_id"},
                    std::pair{R"({"eos_token_id": {"a": 1}})", "eos_token_id"},
                    std::pair{R"({"temperature": "hot"})", "temperature"},
                    std::pair{R"({"temperature": -0.1})", "temperature"},
                    std::pair{R"({"temperature": 1e9})", "temperature"},
                    std::pair{R"({"top_p": 1.5})", "top_p"}, std::pair{R"({"top_p": []})", "top_p"},
                    std::pair{R"({"top_p": 0.9, "top_p": 0.8})", "top_p"}));

}  // namespace
}  // namespace snapmla::model
