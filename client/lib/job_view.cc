#include "client/lib/job_view.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "client/lib/text.h"

namespace attune {
namespace {

// "field:      value" lines.
class Fields {
 public:
  void Add(const std::string& name, const std::string& value) {
    if (value.empty()) return;
    // Further lines of a value stand below its first.
    std::string text = value;
    for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos;) {
      text.insert(at + 1, std::string(kIndent, ' '));
      at += kIndent;
    }
    absl::StrAppend(&out_, absl::StrFormat("%-*s%s\n", kIndent, name + ":", text));
  }
  std::string Take() { return std::move(out_); }

 private:
  static constexpr int kIndent = 18;
  std::string out_;
};

std::string CauseText(v1::FailureCause cause) {
  return cause == v1::FAILURE_CAUSE_UNSPECIFIED
             ? ""
             : std::string(absl::StripPrefix(v1::FailureCause_Name(cause), "FAILURE_CAUSE_"));
}

std::string TimeText(const google::protobuf::Timestamp& time, absl::Time now) {
  if (time.seconds() == 0) return "";
  return absl::StrCat(absl::FormatTime("%Y-%m-%d %H:%M:%S", ToTime(time), absl::LocalTimeZone()),
                      " (", FormatAge(time, now), " ago)");
}

std::string Reason(const std::string& reason, const std::string& message) {
  return reason.empty() || message.empty() ? absl::StrCat(reason, message)
                                           : absl::StrCat(reason, ": ", message);
}

std::string LossText(double loss) {
  return loss == 0 ? "-" : absl::StrFormat("%.4f", loss);
}

void AddValidation(const v1::ValidationReport& report, Fields* fields) {
  if (report.model_parameters() > 0) {
    fields->Add("model", absl::StrCat(report.model_family(), ", ",
                                      FormatCount(report.model_parameters()), " parameters, ",
                                      FormatCount(report.trained_parameters()), " trained"));
  }
  if (report.examples() > 0) {
    fields->Add("data", absl::StrCat(report.examples(), " examples, ", FormatCount(report.tokens()),
                                     " tokens in an epoch (", FormatCount(report.trained_tokens()),
                                     " trained), ", report.dropped_examples(), " dropped, ",
                                     report.truncated_examples(), " truncated"));
  }
  if (report.memory().peak_bytes() > 0) {
    fields->Add("memory",
                absl::StrCat(FormatBytes(report.memory().peak_bytes()),
                             " on each device, at its peak in ", report.memory().peak_phase()));
  }
  fields->Add("errors", absl::StrJoin(report.errors(), "\n"));
  fields->Add("warnings", absl::StrJoin(report.warnings(), "\n"));
}

void AddAttempts(const v1::Job& job, Fields* fields) {
  for (const v1::Attempt& attempt : job.attempts()) {
    const std::string end = attempt.failure_cause() == v1::FAILURE_CAUSE_UNSPECIFIED
                                ? (attempt.end_time().seconds() == 0 ? "runs" : "ended")
                                : CauseText(attempt.failure_cause());
    fields->Add(absl::StrCat("attempt ", attempt.attempt()),
                absl::StrCat("from step ", attempt.from_step(), " on ",
                             absl::StrJoin(attempt.devices(), ", "), ": ", end,
                             attempt.message().empty() ? "" : "\n", attempt.message()));
  }
}

}  // namespace

std::string IdOf(const std::string& name) {
  return name.substr(name.find_last_of('/') + 1);
}

std::string ProgressText(const v1::Progress& progress) {
  if (progress.total_steps() <= 0) return "-";
  return absl::StrFormat("%d/%d (%d%%)", progress.step(), progress.total_steps(),
                         100 * progress.step() / progress.total_steps());
}

std::string JobsTable(const v1::ListJobsResponse& jobs, absl::Time now) {
  if (jobs.jobs().empty()) return "no jobs; `attune submit job.yaml` makes one\n";
  Table table({"JOB", "NAME", "STATE", "STEP", "LOSS", "TOK/S", "LEFT", "RESTARTS", "AGE"});
  for (const v1::Job& job : jobs.jobs()) {
    const bool running = job.state() == v1::JOB_STATE_RUNNING;
    table.Add({IdOf(job.name()), job.display_name(), FormatState(job.state()),
               ProgressText(job.progress()), LossText(job.progress().loss()),
               running ? FormatCount(job.progress().tokens_per_s()) : "-",
               running && job.progress().remaining_s() > 0
                   ? FormatDuration(job.progress().remaining_s())
                   : "-",
               absl::StrCat(job.restarts()), FormatAge(job.create_time(), now)});
  }
  return table.Render();
}

std::string JobDetails(const v1::Job& job, absl::Time now) {
  Fields fields;
  fields.Add("job", job.name());
  fields.Add("name", job.display_name());
  fields.Add("state", FormatState(job.state()));
  fields.Add("reason", Reason(job.reason(), job.message()));
  fields.Add("cause", CauseText(job.failure_cause()));
  fields.Add("progress", ProgressText(job.progress()));
  if (job.progress().step() > 0) {
    fields.Add("loss", LossText(job.progress().loss()));
    fields.Add("speed", absl::StrCat(FormatCount(job.progress().tokens_per_s()), " tokens/s"));
  }
  if (job.progress().remaining_s() > 0) {
    fields.Add("left", FormatDuration(job.progress().remaining_s()));
  }
  fields.Add("devices", absl::StrJoin(job.devices(), ", "));
  fields.Add("restarts", absl::StrCat(job.restarts(), " of ", job.spec().retry().max_restarts()));
  fields.Add("created", TimeText(job.create_time(), now));
  fields.Add("started", TimeText(job.start_time(), now));
  fields.Add("ended", TimeText(job.end_time(), now));
  AddValidation(job.validation(), &fields);
  fields.Add("final checkpoint", job.final_checkpoint());
  AddAttempts(job, &fields);
  return fields.Take();
}

std::string WorkersTable(const v1::ListWorkersResponse& workers, absl::Time now) {
  if (workers.workers().empty()) return "no workers; start attune-worker on a host\n";
  Table table({"WORKER", "HOST", "STATE", "HEARD", "DEVICE", "MODEL", "MEMORY", "THREADS", "JOB"});
  for (const v1::Worker& worker : workers.workers()) {
    std::string id = IdOf(worker.name()), host = worker.hostname();
    std::string state = worker.connected() ? "connected" : "away";
    std::string heard = FormatAge(worker.last_heartbeat_time(), now);
    if (worker.devices().empty()) table.Add({id, host, state, heard, "-"});
    for (const v1::Device& device : worker.devices()) {
      std::string job = "-";
      for (const v1::DeviceUse& use : worker.uses()) {
        if (use.device() == device.id()) job = IdOf(use.job());
      }
      for (const v1::DeviceStatus& status : worker.statuses()) {
        const bool faulty = status.device() == device.id() && !status.fault().empty();
        if (faulty) job = absl::StrCat("faulty: ", status.fault());
      }
      table.Add({id, host, state, heard, device.id(), device.model(),
                 FormatBytes(device.memory_bytes()), absl::StrCat(device.threads()), job});
      // Of the worker's further devices only what is theirs.
      id = host = state = heard = "";
    }
  }
  return table.Render();
}

std::string CheckpointsTable(const v1::ListCheckpointsResponse& checkpoints, absl::Time now) {
  if (checkpoints.checkpoints().empty()) return "no checkpoints yet\n";
  Table table({"STEP", "LOSS", "EVALUATION", "SIZE", "ATTEMPT", "AGE", "ARTIFACT"});
  for (const v1::Checkpoint& checkpoint : checkpoints.checkpoints()) {
    table.Add({absl::StrCat(checkpoint.step(), checkpoint.final() ? " (final)" : "",
                            checkpoint.best() ? " (best)" : ""),
               LossText(checkpoint.loss()), LossText(checkpoint.evaluation_loss()),
               FormatBytes(checkpoint.bytes()), absl::StrCat(checkpoint.attempt()),
               FormatAge(checkpoint.create_time(), now), checkpoint.artifact()});
  }
  return table.Render();
}

std::string EventLine(const v1::Event& event, absl::TimeZone zone) {
  const std::string kind =
      event.kind() == v1::EVENT_KIND_STATE
          ? FormatState(event.state())
          : std::string(absl::StripPrefix(v1::EventKind_Name(event.kind()), "EVENT_KIND_"));
  const std::string text = event.message().empty() ? event.reason() : event.message();
  std::string line = absl::StrFormat(
      "%s  %-11s %s", absl::FormatTime("%H:%M:%S", ToTime(event.time()), zone), kind, text);
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

std::string LogText(const v1::LogLine& line, absl::TimeZone zone) {
  const std::string who = line.rank() < 0 ? "agent" : absl::StrCat("rank ", line.rank());
  return absl::StrFormat("%s  %-7s %s", absl::FormatTime("%H:%M:%S", ToTime(line.time()), zone),
                         who, line.text());
}

}  // namespace attune
