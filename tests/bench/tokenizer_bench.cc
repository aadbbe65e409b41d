// tokenizer_bench TOKENIZER TEXT [THREADS]: tokenises the lines of a file, and says how fast.
//   {"mib_per_s": ..., "tokens": ..., "load_s": ...}
// compare_tokenizers.py beside it runs Hugging Face `tokenizers` on the same text in turn.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "absl/strings/str_split.h"
#include "worker/data/tokenizer.h"
#include "worker/io/file.h"

namespace {

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: tokenizer_bench TOKENIZER TEXT [THREADS]\n");
    return 2;
  }
  const int num_threads = argc > 3 ? std::atoi(argv[3]) : 1;
  const double start = Seconds();
  const auto tokenizer = attune::Tokenizer::Load(argv[1]);
  const auto text = attune::ReadFile(argv[2]);
  if (!tokenizer.ok() || !text.ok()) {
    std::fprintf(stderr, "%s %s\n", tokenizer.status().ToString().c_str(),
                 text.status().ToString().c_str());
    return 1;
  }
  const double loaded = Seconds();
  const std::vector<absl::string_view> lines = absl::StrSplit(*text, '\n');
  std::atomic<size_t> next{0};
  std::atomic<int64_t> tokens{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    constexpr size_t kBatch = 64;
    for (size_t begin; (begin = next.fetch_add(kBatch)) < lines.size();) {
      for (size_t i = begin; i < std::min(lines.size(), begin + kBatch); ++i) {
        const auto encoding = tokenizer->Encode(lines[i], /*add_special_tokens=*/true);
        if (!encoding.ok()) failed = true;
        if (encoding.ok()) tokens += static_cast<int64_t>(encoding->ids.size());
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (failed) {
    std::fprintf(stderr, "a line could not be tokenised\n");
    return 1;
  }
  const double seconds = Seconds() - loaded;
  std::printf("{\"mib_per_s\": %.2f, \"tokens\": %lld, \"load_s\": %.3f}\n",
              static_cast<double>(text->size()) / seconds / (1 << 20),
              static_cast<long long>(tokens), loaded - start);
  return 0;
}
