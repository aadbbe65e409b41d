// Precompiled normalizer: the character map of a SentencePiece model (T5, XLM-RoBERTa).
//
//   base64 of  u32 n | n bytes of trie | texts, each ended by \0
//
// The trie is a double array (Darts-clone) whose values are offsets of texts. A grapheme of fewer
// than 6 bytes is replaced whole if the trie has one of its beginnings, the shortest counting; else
// each of its characters is looked up alone. That is what Hugging Face does.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/data/stages/normalizer.h"
#include "worker/io/json.h"

namespace attune {

absl::StatusOr<std::unique_ptr<const Normalizer>> MakePrecompiled(const JsonField& field);

}  // namespace attune
