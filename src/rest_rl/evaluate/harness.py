"""The evaluation loop: run conversations in batches, log one row per finished sample, summarize the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event, Lock
from typing import Any

from rest_rl.evaluate.conversation import Benchmark, Conversation, Model, Reply
from rest_rl.evaluate.log import EvalLog, Row
from rest_rl.formats import ToolFormat
from rest_rl.statistics import clustered_wilson_interval

OVERALL = "overall"


# Resume: batches are cut from the full list in a fixed order, and a batch with a missing sample runs again as a whole.
# In 16-bit arithmetic a text depends on the shape of its batch; with the same batches, a resumed evaluation produces
# the same texts as an uninterrupted one (on the same machine). Rows already in the log are not written twice.
#
# Threads: one worker per unit of `model.concurrency`, each with one batch at a time. `lock` serializes the log and
# `on_row`. On the first exception `stopped` ends all conversations between two steps, queued batches are cancelled
# and `model.stop` interrupts pending requests. Their error replies are results of the stop, not of the samples, and
# are therefore not logged.
def evaluate_all(
    benchmark: Benchmark,
    model: Model,
    tool_format: ToolFormat,
    identities: Sequence[str],
    log: EvalLog,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Evaluate the samples that the log does not contain yet; return the rows of all `identities`, in this order.

    `on_row` is called for each row that is written. An exception raised by the model, for example because of a wrong
    API key, stops the evaluation; the rows written so far remain in the log.
    """
    done = {row["id"]: row for row in log.read_rows()}
    batches = [batch for batch in split_batches(identities, model.batch_size) if not done.keys() >= set(batch)]
    lock, stopped = Lock(), Event()

    def ask(batch: Sequence[str]) -> None:
        try:
            for row in evaluate_batch(benchmark, model, tool_format, batch, stopped):
                with lock:
                    if row["id"] not in done and not ("error" in row and stopped.is_set()):
                        log.add(row)
                        done[row["id"]] = row
                        on_row(row)
        except BaseException:
            stopped.set()  # set it here: otherwise this thread might start another batch first
            raise

    with ThreadPoolExecutor(max(1, model.concurrency)) as pool:
        running = [pool.submit(ask, batch) for batch in batches]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            model.stop()  # otherwise leaving this block waits for every pending request and its retries
            raise
    rows = [done[identity] for identity in identities]
    log.write_rows(rows)
    return rows


def split_batches(identities: Sequence[str], size: int) -> list[Sequence[str]]:
    return [identities[start : start + size] for start in range(0, len(identities), max(1, size))]


# All conversations of a batch advance one step at a time: each round collects their next requests and sends them to
# the model together. A conversation leaves the batch when it has no further request or its reply contains no text.
def evaluate_batch(
    benchmark: Benchmark, model: Model, tool_format: ToolFormat, batch: Sequence[str], stopped: Event
) -> Iterator[Row]:
    """Run the conversations of a batch of samples; yield the row of each sample as soon as its conversation is over."""
    active = [ActiveConversation(benchmark, identity, tool_format) for identity in batch]
    try:
        while active and not stopped.is_set():
            requests = [each.conversation.request() for each in active]
            yield from (each.finish() for each, request in zip(active, requests, strict=True) if request is None)
            active = [each for each, request in zip(active, requests, strict=True) if request is not None]
            pending_requests = [request for request in requests if request is not None]
            replies = model.respond(pending_requests) if pending_requests else []
            for each, reply in zip(list(active), replies, strict=True):
                if row := each.receive(reply):
                    yield row
                    active.remove(each)
    finally:
        for each in active:
            each.conversation.close()


class ActiveConversation:
    """A running conversation, and the fields of its row that the benchmark does not provide, such as token counts."""

    def __init__(self, benchmark: Benchmark, identity: str, tool_format: ToolFormat) -> None:
        self.conversation: Conversation = benchmark.start(identity, tool_format)
        self.metrics = benchmark.metrics
        self.row_start: Row = {"id": identity, benchmark.group_field: benchmark.groups[identity]}
        self.reply_fields: Row = {}

    def receive(self, reply: Reply) -> Row | None:
        """Pass a reply to the conversation. If it contains no response, close the conversation and return the row."""
        if reply.tokens is not None:
            self.reply_fields["tokens"] = self.reply_fields.get("tokens", 0) + reply.tokens
        if reply.prompt_tokens is not None:
            self.reply_fields["prompt_tokens"] = max(self.reply_fields.get("prompt_tokens", 0), reply.prompt_tokens)
        if reply.is_truncated:
            self.reply_fields["truncated"] = True
        if reply.calls is not None:
            self.reply_fields["native"] = True
        ends = {"overflow": reply.overflow, "refused": reply.refusal, "error": reply.error}
        kind = next((name for name, why in ends.items() if why), None)
        if kind is None:
            self.conversation.receive(reply)
            return None
        record = self.conversation.record()
        self.conversation.close()
        if kind == "error":
            verdicts = dict.fromkeys(self.metrics)
            return {**self.row_start, **record, **verdicts, "error": reply.error, **self.reply_fields}
        verdicts = dict.fromkeys(self.metrics, False)
        why = {"reason": f"{kind}: {ends[kind]}", kind: ends[kind]}
        return {**self.row_start, **record, **verdicts, **why, **self.reply_fields}

    def finish(self) -> Row:
        """Judge and close a conversation that has no further request, and return its row."""
        try:
            outcome = self.conversation.outcome()
            verdicts = dict.fromkeys(self.metrics) if "error" in outcome else {}
            return {**self.row_start, **outcome, **verdicts, **self.reply_fields}
        finally:
            self.conversation.close()


def summarize(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the scores and the description of the benchmark for summary.json.

    `groups` contains the scores of each group, and of all samples (`overall`) unless there are official averages.
    """
    sizes = Counter(group_label(benchmark.group_field, group) for group in benchmark.groups.values())
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(group_label(benchmark.group_field, row[benchmark.group_field]), []).append(row)
    cluster = getattr(benchmark, "cluster_field", "id")
    groups = {
        name: score_group(members[name], benchmark.metrics, size, cluster)
        for name, size in sizes.items()
        if name in members
    }
    extras = dict(benchmark.extras(rows))
    if "official" not in extras:
        groups[OVERALL] = score_group(rows, benchmark.metrics, len(benchmark.groups), cluster)
    about = {"benchmark": benchmark.name, "pin": benchmark.pin, "metrics": list(benchmark.metrics)}
    return {**about, "group_field": benchmark.group_field, "cluster_field": cluster, "groups": groups, **extras}


def group_label(field: str, group: str | int) -> str:
    """Return a group's name in summary.json; a group that is a number gets the field as a prefix, as in `Level1`."""
    return group if isinstance(group, str) else f"{field.title()}{group}"


def score_group(rows: Sequence[Row], metrics: Sequence[str], size: int, cluster: str = "id") -> dict[str, Any]:
    """Return the scores of a group of `size` samples. Samples without a response are only listed in `errors`."""
    scored = [row for row in rows if "error" not in row]
    headline, *others = (score_metric(scored, metric, cluster) for metric in metrics)
    return {
        "n": len(scored),
        "of": size,
        **headline,
        **dict(zip(metrics[1:], others, strict=True)),
        "overflow": sum("overflow" in row for row in scored),
        "refused": sum("refused" in row for row in scored),
        "truncated": sum(bool(row.get("truncated")) for row in scored),
        "errors": [row["id"] for row in rows if "error" in row],
    }


def score_metric(rows: Sequence[Mapping[str, Any]], metric: str, cluster: str = "id") -> dict[str, Any]:
    """Return the number of correct rows, the accuracy (None without rows) and its 95 % Wilson interval.

    Rows with the same value in the field `cluster` are not independent. A row without it is a cluster of its own.
    """
    counts: dict[str, list[int]] = {}
    for row in rows:
        own = counts.setdefault(str(row.get(cluster, row["id"])), [0, 0])
        own[0] += bool(row[metric])
        own[1] += 1
    correct = sum(right for right, _ in counts.values())
    low, high = clustered_wilson_interval([(right, n) for right, n in counts.values()])
    return {"correct": correct, "accuracy": correct / len(rows) if rows else None, "low": low, "high": high}
