// Text from a checkpoint, with an FP8 cache: generate MODEL_DIR
#include <snapmla/snapmla.h>

#include <iostream>

int main(int argc, char** argv) {
  snapmla::EngineOptions options;
  options.model_dir = argc > 1 ? argv[1] : "models/snapmla-20m";
  options.kv_cache = snapmla::KvCacheFormat::kFp8;
  try {
    snapmla::Engine engine(options);
    snapmla::SamplingParams sampling;  // greedy
    sampling.max_tokens = 40;
    const auto show = [](const std::string& text) {
      std::cout << text << std::flush;
      return true;  // false would cancel
    };
    const auto out = engine.generate(engine.encode("import numpy as"), sampling, show);
    std::cout << "\n" << out.tokens.size() << " tokens, " << out.cache_bytes << " cache bytes\n";
  } catch (const snapmla::Error& e) {
    std::cerr << e.what() << '\n';
    return 1;
  }
}
