"""The script of a rented machine, which starts empty: it gets the recipe, trains, and keeps what training writes in a bucket.

The bucket need not be a complete file system: files are only copied to it. A checkpoint that was copied halfway is found to be
incomplete by its recorded sizes and hashes when training resumes.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from hfstrat import errors
from hfstrat.clusters import paths, script
from hfstrat.clusters.job import Job, config_of
from hfstrat.clusters.paths import Place
from hfstrat.errors import UserError
from hfstrat.recipe import library

RECIPE, CONFIG = "recipe.yaml", "accelerate.yaml"
FINAL = (errors.USER, errors.NON_FINITE, errors.OUT_OF_MEMORY, errors.ARTIFACT, errors.DISK_FULL)  # ends that would repeat
SAVING = 300.0  # seconds before the end of a session at which training is told to save
KEEP_EVERY = 60  # seconds between two copies to the bucket

START = """\
work={work}
mkdir -p "$work" && cd "$work" || exit 1
cat > {recipe_file} <<{recipe}
"""

KEEP = """\
mkdir -p "$store" "$run" || exit 1
if [ -d "$store/run" ]; then
  echo "hfstrat: continues with what earlier attempts have kept"
  cp -r "$store/run/." "$run/" || exit 1
fi
# copies what is new; what training has removed, such as an old checkpoint, is removed from the bucket too
keep() {
  mkdir -p "$store/run" && cp -ru "$run/." "$store/run/" || return 1
  for old in "$store"/run/*; do
    if [ -e "$old" ] && [ ! -e "$run/${old##*/}" ]; then rm -rf "$old"; fi
  done
}
"""

NO_KEEP = """\
mkdir -p "$run" || exit 1
keep() { :; }
"""

AGAIN = """\
# an attempt that ended for good is not repeated
ended="{ended}-{launch}"
if [ -f "$ended" ]; then
  echo "hfstrat: an earlier attempt ended with code $(cat "$ended"); it is not repeated" >&2
  exit "$(cat "$ended")"
fi
"""

SESSION = """\
final=
before=$(newest)
training=
trap 'kill -TERM "$training" 2>/dev/null' TERM INT
{command} &
training=$!
kept=$SECONDS
while kill -0 "$training" 2>/dev/null; do
  if [ $((SECONDS - kept)) -ge {every} ]; then
    keep 2>/dev/null  # a file that training removes meanwhile is no error
    kept=$SECONDS
  fi
  sleep 1 &
  wait "$!"
done
{wait}
if ! keep; then
  echo "hfstrat: the bucket could not be written completely" >&2
  [ "$code" -ne 0 ] || code=1
fi
"""

END = """\
if [ "$code" -eq 126 ] || [ "$code" -eq 127 ]; then
  echo "hfstrat: this machine has no command hfstrat; install it by --package, or name a --container that has it" >&2
  final=1
elif [ "$code" -ge 124 ]; then  # stopped: 124 by the time limit, {interrupted} by a signal once it has saved
  stopped=$code code={interrupted}
  if [ "$(newest)" = "$before" ]; then
    code={crash}
    if [ "$stopped" -eq 124 ]; then
      echo "hfstrat: no checkpoint was saved in this session, so it is not repeated; give more --time" >&2
      final=1
    else
      echo "hfstrat: stopped by a signal, and no checkpoint was saved in this session" >&2
    fi
  fi
fi
"""

NOTE = """\
case "$code" in {final}) final=1 ;; esac
if [ -n "$final" ] && [ -n "$ended" ]; then echo "$code" > "$ended"; fi
"""


def local_places(job: Job) -> list[Place]:
    """The files and folders of this machine that the recipe reads.

    Raises:
        UserError: a path that is neither here nor on a volume.
    """
    found = []
    for place in paths.places(paths.raw(job.loaded.source, job.overrides)):
        if job.is_mounted(str(place.path)):
            continue
        if place.is_here:
            found.append(place)
        elif place.looks_local:
            raise UserError(
                f"{place.key}: {place.value}: no such file here, and no --volume is mounted there; name a file, a Hub id, or "
                "mount a volume"
            )
    return found


def recipe_text(job: Job, names: dict[str, str], output_dir: str) -> str:
    """The recipe for the remote machine: with its overrides, and the paths of that machine."""
    data: dict[str, Any] = paths.replaced(paths.raw(job.loaded.source, job.overrides), names)
    data["output_dir"] = output_dir
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def output_dir(job: Job) -> str:
    """output_dir on the remote machine: as in the recipe where it is relative or on a volume, otherwise `runs/NAME`."""
    given = Path(job.loaded.recipe.output_dir)
    relative = not given.is_absolute() and not {"..", "~"} & set(given.parts)
    return str(given) if relative or job.is_mounted(str(given)) else f"runs/{job.name}"


def own_config(job: Job) -> str | None:
    """The text of an Accelerate config that is a file of the user."""
    name = job.options.accelerate_config
    return Path(name).read_text(encoding="utf-8") if name and Path(name).is_file() else None


def config_name(job: Job) -> str | None:
    """The Accelerate config on the remote machine."""
    if own_config(job) is not None:
        return CONFIG
    name = config_of(job.options.accelerate_config, job.nodes, job.gpus)[0]
    return name and library.find("accelerate_configs", name).stem


def text(
    job: Job,
    names: dict[str, str],
    *,
    work: str,
    store: str | None,
    launch: str,
    is_kept: bool = False,
    lines: tuple[str, ...] = (),
    rank: str = "",
) -> str:
    """The complete script of a machine.

    Args:
        names: paths below `files/` of local files, by their values in the recipe.
        work, store: words of the shell: the working folder, and that of the bucket; without a bucket nothing is kept.
        launch: this launch; further attempts of it have the same.
        is_kept: output_dir outlives the machine by itself, as on a volume.
        lines: run before training, in the working folder.
        rank: lines that set NODE, HOST0 and PORT.
    """
    run = output_dir(job)
    word, recipe = script.here(recipe_text(job, names, run))
    parts = [
        "#!/bin/bash",
        f"# written by hfstrat launch: {job.name}",
        START.format(work=work, recipe=word, recipe_file=RECIPE).rstrip(),
        recipe,
    ]
    if (config := own_config(job)) is not None:
        word, config = script.here(config)
        parts += [f"cat > {CONFIG} <<{word}", config]
    parts += [*lines, script.exports({"PYTHONUNBUFFERED": "1", **job.env}).rstrip(), *job.options.before, rank.rstrip()]
    parts += ["set -u", f"run={shlex.quote(run)}"]  # not before: scripts of others read variables that are not set
    ended = "$store/ended" if store else "$run.ended" if is_kept else ""
    parts += [f"store={store}"] if store else []
    parts.append(AGAIN.format(ended=ended, launch=launch).rstrip() if ended else "ended=")
    parts.append((KEEP if store else NO_KEEP).rstrip())
    parts += [
        script.NEWEST.rstrip(),
        SESSION.format(command=_command(job), every=KEEP_EVERY, wait=script.WAIT.rstrip()).rstrip(),
    ]
    parts.append(END.format(interrupted=errors.INTERRUPTED, crash=errors.CRASH).rstrip())
    parts.append(NOTE.format(final="|".join(map(str, FINAL))).rstrip())
    return "\n".join(part for part in [*parts, 'exit "$code"\n'] if part)


def _command(job: Job) -> str:
    """Training with its time limit: it is told to save before the session ends."""
    command = script.train(job, ["hfstrat"], RECIPE, [], config_name(job))
    return f"timeout --foreground --signal=TERM {session(job.limit):.0f} {command}" if job.limit else command


def session(limit: float) -> float:
    """Seconds after which training is told to save."""
    return limit - min(SAVING, max(limit / 10, 60.0), limit / 2)
