// render_tool: reads lines of JSON {"template", "variables", "messages", "tools", "documents",
// "add_generation_prompt", "now": [y, m, d, h, m, s]}, writes per line {"text", "generation"} or
// {"error"}. Driven by the live check of public templates beside it.
#include <iostream>
#include <map>
#include <string>

#include "worker/data/chat_template.h"
#include "worker/io/json.h"

namespace {

attune::OrderedJson Render(const attune::OrderedJson& job) {
  attune::OrderedJson out;
  auto chat_template =
      attune::ChatTemplate::FromSource(job.at("template").get<std::string>(), "default");
  if (!chat_template.ok()) {
    out["error"] = chat_template.status().ToString();
    return out;
  }
  const auto now = job.at("now").get<std::vector<int>>();
  chat_template->set_clock(
      [now] { return absl::CivilSecond(now[0], now[1], now[2], now[3], now[4], now[5]); });
  attune::ChatRequest request;
  request.messages = job.at("messages");
  request.tools = job.at("tools");
  request.documents = job.at("documents");
  request.add_generation_prompt = job.at("add_generation_prompt").get<bool>();
  request.variables = job.at("variables");
  const auto chat = chat_template->Render(request);
  if (!chat.ok()) {
    out["error"] = chat.status().ToString();
    return out;
  }
  out["text"] = chat->text;
  out["generation"] = attune::OrderedJson::array();
  for (const attune::ByteSpan& span : chat->generation) {
    out["generation"].push_back({span.begin, span.end});
  }
  return out;
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    const auto job = attune::ParseOrderedJson(line, "input");
    attune::OrderedJson out;
    if (job.ok()) {
      out = Render(*job);
    } else {
      out["error"] = job.status().ToString();
    }
    std::cout << out.dump() << "\n";
  }
  return 0;
}
