"""Every bound of the API in one place, with its reason.

The gateway's schema shows the same numbers, so that both doors refuse alike.
"""

MODELS_PER_DECLARATION_MAX = 100
"""One declaration is one transaction; 100 records stay below the store's 128 operations."""

NAME_LENGTH_MAX = 63
"""Longest DNS label; names become parts of host names and container names."""

MODEL_LENGTH_MAX = 4096
"""Longest path of Linux."""

PRIORITY_MIN, PRIORITY_MAX = 1, 10
"""Least and greatest importance of a deployment."""

PLACEMENT_ENTRIES_MAX = 32
"""Labels, tolerations or taints of one object; nobody tells machines apart by more."""

LABEL_LENGTH_MAX = 63
"""Of a label's name and of its value, as in Kubernetes; a prefix in front may be a DNS name."""

REPLICAS_MAX = 1000
"""Far beyond what one deployment needs; a larger number is a typing mistake."""

MAX_MODEL_LEN_MAX = 100_000_000
"""Ten times the longest context that any published model claims."""

EXTRA_ARGUMENTS_MAX = 64
"""Engines have a few hundred flags; nobody sets more than a handful."""

EXTRA_ARGUMENTS_BYTES_MAX = 64 * 1024
"""Of all arguments as JSON. They travel on a command line, whose limit is 128 KiB an argument."""

EXTRA_ARGUMENT_NAME_LENGTH_MAX = 128
"""Longer than any engine's longest flag."""

METADATA_BYTES_MAX = 16 * 1024
"""As JSON. The store keeps a thousand deployments' metadata in memory several times over."""

JSON_DEPTH_MAX = 16
"""Nesting of extra_args and metadata; protobuf refuses messages that nest deeper than 100."""

EXTERNAL_URLS_MAX = 256
"""Endpoints of one external deployment; each is probed and scraped once a second."""

STRATEGY_LENGTH_MAX = 256
"""All built-in plug-ins with weights fit in; it travels in every view of every router."""

QUEUE_REQUESTS_MAX = 100_000
"""Bodies of a longer queue would not fit into a router's memory."""

QUEUE_SECONDS_MAX = 3600
"""Clients give up long before."""

EJECTION_SECONDS_MAX = 3600
"""An endpoint that is to be left alone for longer is drained."""

CONSECUTIVE_FAILURES_MAX = 1000
"""An engine that fails this often in a row serves nobody."""

ALIASES_MAX = 100
"""Of one namespace; each is in every view of every router."""

ALIAS_LENGTH_MAX = 128
"""Longest model id that clients are known to send has about half of it."""

ALIAS_TARGETS_MAX = 16
"""Deployments behind one alias."""

ALIAS_WEIGHT_MAX = 1_000_000
"""Finer shares cannot be told from none."""

QUOTA_MAX = 1_000_000
"""A larger number is a typing mistake; no quota is unbounded."""

REQUEST_ID_LENGTH_MAX = 64
"""A UUID has 36 characters."""

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
PAGE_BYTES_MAX = 4 * 1024 * 1024
"""Pages are cut here: failures carry log lines, and a message has at most 8 MiB."""

WATCH_BUFFER_MAX = 1000
"""Messages kept for a slow watcher before it is cut: listing again costs less than a longer buffer."""

WATCHERS_MAX = 500
"""Concurrent watches of one process; 500 full buffers of 2 KiB messages are 1 GiB at the very worst."""

PROGRESS_SECONDS = 5.0
"""Idle watches say so this often, so that a dead stream is noticed."""

EVENTS_REPLAYED_MAX = 50_000
"""Newest kept events that a watch of all namespaces replays; they are sorted in memory."""

COMMIT_ATTEMPTS_MAX = 5
"""Tries of a read-modify-write without etag before it answers ABORTED."""

MIRROR_WAIT_SECONDS = 5.0
"""How long a write waits until this process's own view shows it; usually a few milliseconds."""

MODEL_CONFIG_BYTES_MAX = 1024 * 1024
"""config.json of a real model has a few KiB."""

MODEL_INDEX_BYTES_MAX = 64 * 1024 * 1024
"""Safetensors index of the largest published mixture of experts has about 10 MiB."""

MODEL_FILES_MAX = 10_000
"""Entries looked at in a model directory."""

HUB_TIMEOUT_SECONDS = 5.0
"""A declaration must not hang on a hub that is not there."""

REMEMBERED_REQUESTS_MAX = 1000
REMEMBERED_SECONDS = 600.0
"""Answers kept for retries with the same request_id: a client that retries does so within minutes."""

LOG_TAIL_LINES_DEFAULT = 100
LOG_TAIL_LINES_MAX = 10_000
LOG_BUFFER_LINES = 1000
"""Lines between the agents' streams and a slow reader; beyond, the agents wait."""

LOG_STREAMS_MAX = 200
"""Replicas followed by one log stream; each holds a connection to an agent."""

CRON_WINDOWS_MAX = 100
"""Windows of one deployment; each is looked at once a second."""

LATENCY_MS_MAX = 3_600_000
"""An hour: no one waits longer for a first token."""

WAITING_REQUESTS_MAX = 100_000
"""Far above what an engine queues."""

THOUGHTS_MAX = 16
"""Dry runs and explanations under way: with the largest clusters each takes up to half a second."""
