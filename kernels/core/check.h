// CHECK for programmer errors only: never on anything that came from a user or a file
// (those return absl::Status where they are read).
#pragma once

#include <cstdio>
#include <cstdlib>

#define ATTUNE_STRINGIFY_(x) #x
#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, \
                   ATTUNE_STRINGIFY_(condition));                           \
      std::abort();                                                         \
    }                                                                       \
  } while (false)
