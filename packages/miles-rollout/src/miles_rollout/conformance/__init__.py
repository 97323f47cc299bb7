"""Does a server speak SGLang's native API, OpenAI's /v1 and the admin API as clients expect? Runs against any server."""

from miles_rollout.conformance.report import CheckResult, Report
from miles_rollout.conformance.suite import run_suite
from miles_rollout.conformance.target import Options

__all__ = ["CheckResult", "Options", "Report", "run_suite"]
