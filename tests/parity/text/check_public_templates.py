"""Compares render_tool over every template of a directory with jinja2 set up as Transformers does
it, or, with --transformers, with the apply_chat_template of the Transformers that is installed.

usage: check_public_templates.py RENDER_TOOL TEMPLATES_DIRECTORY [--transformers] [--errors]

A pair agrees if both give the same text and spans, or both refuse. Exit status 1 on a difference.
"""

import json
import pathlib
import subprocess
import sys

import conversations
import oracle
import transformers_oracle


def main():
    tool, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    templates = sorted(directory.glob("*.jinja"))
    if not templates:
        sys.exit(f"no *.jinja in {directory}")
    all_jobs, render = list(conversations.jobs()), oracle.render
    if "--transformers" in sys.argv:
        render = transformers_oracle.Oracle().render
        # It refuses these before a template sees them.
        all_jobs = [job for job in all_jobs if job["messages"]]
    total = refused = differences = 0
    for path in templates:
        source = path.read_text()
        jobs = [{**job, "template": source} for job in all_jobs]
        lines = "\n".join(json.dumps(job) for job in jobs)
        run = subprocess.run([tool], input=lines, capture_output=True, text=True, check=True)
        ours = [json.loads(line) for line in run.stdout.split("\n") if line]
        assert len(ours) == len(jobs), f"{path.name}: {len(ours)} results for {len(jobs)} jobs"
        same = both_refuse = 0
        for job, result in zip(jobs, ours):
            try:
                text, spans = render(source, job)
                wanted = {"text": text, "generation": spans}
            except Exception as error:  # whatever a template does wrong in Python
                wanted = {"error": f"{type(error).__name__}: {error}"}
            if "error" in wanted and "error" in result:
                both_refuse += 1
                if "--errors" in sys.argv:
                    print("  ", job["name"], "|", wanted["error"][:100], "|", result["error"][:160])
            elif wanted == result:
                same += 1
            else:
                differences += 1
                print(f"{path.name}: {job['name']}\n  oracle: {wanted}\n  attune: {result}")
        print(f"{path.name}: {same} equal, {both_refuse} refused by both, of {len(jobs)}")
        total += len(jobs)
        refused += both_refuse
    print(f"{len(templates)} templates, {total} renderings, {refused} refused by both, "
          f"{differences} differences")
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
