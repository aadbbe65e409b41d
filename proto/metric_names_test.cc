#include "proto/metric_names.h"

#include <set>

#include "gtest/gtest.h"

namespace attune::metrics {
namespace {

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

TEST(MetricNamesTest, FollowTheRules) {
  std::set<std::string> seen;
  for (const MetricName& metric : AllMetrics()) {
    const std::string name = metric.name;
    EXPECT_TRUE(seen.insert(name).second) << name << " is listed twice";
    EXPECT_EQ(EndsWith(name, "_total"), metric.type == MetricType::kCounter) << name;
    if (metric.type == MetricType::kHistogram) {
      EXPECT_TRUE(EndsWith(name, "_seconds")) << name;
    }
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string::npos) << name;
    EXPECT_TRUE(EndsWith(metric.help, ".")) << name;
    for (const char* label : metric.labels) {
      EXPECT_NE(std::string(label), "job") << name << ": Prometheus sets this label itself";
      EXPECT_NE(std::string(label), "job_id") << name << ": grows with the number of jobs";
    }
    EXPECT_EQ(FindMetric(name), &metric);
  }
  EXPECT_EQ(FindMetric("attune_nothing"), nullptr);
}

}  // namespace
}  // namespace attune::metrics
