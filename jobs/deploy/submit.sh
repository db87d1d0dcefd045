#!/bin/sh
# One incremental run on a Ray cluster that is there already: submit.sh JOB [OPTIONS OF glm-batch cron]
#
# The cluster, on its head node; the job server listens to this machine alone, and both ask for the token:
#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(cat ~/.ray/auth_token)"
#   ray start --head --include-dashboard=true --dashboard-host=127.0.0.1
# From elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD, with the same RAY_AUTH_TOKEN. Ends with the run's exit code 0, or 1.
set -eu
: "${RAY_AUTH_TOKEN:?set it to the token of the cluster}"
: "${1:?name a job file: submit.sh JOB}"
export RAY_AUTH_MODE=token
# The job server sets RAY_ADDRESS for the entrypoint, so that the run uses this cluster instead of starting its own Ray.
exec ray job submit --address "${RAY_JOB_SERVER:-http://127.0.0.1:8265}" \
    -- glm-batch cron "$@"
