"""`qwq pull --convert`: converts the original weights shard by shard while they are downloaded."""

from __future__ import annotations

import re
import time
from contextlib import closing
from pathlib import Path

from qwq_convert.file_types import find_file_type
from qwq_convert.pipeline import (
    ConversionDone,
    ConversionPlanned,
    ConversionRestarted,
    ConversionResumed,
    RowsWritten,
    TensorDone,
)
from qwq_convert.plan import ConvertRequest

from qwq_local.cli.environment import Environment
from qwq_local.cli.flags import PullFlags
from qwq_local.cli.pull import PullScreen
from qwq_local.errors import ExitStatus
from qwq_local.hub.cache import HubCache
from qwq_local.hub.checkpoint import ShardCaches
from qwq_local.hub.client import Hub
from qwq_local.hub.conversion import ShardsPlanned, WeightsEvent, convert_weights
from qwq_local.hub.pull import BytesReceived, FileDone, FileStarted, Puller
from qwq_local.hub.transfer import TransferSettings
from qwq_local.models.inventory import Places
from qwq_local.paths import make_private
from qwq_local.profiles.layers import ResolvedProfile
from qwq_local.terminal.output import Output
from qwq_local.text import GB, decimal_size, plural


def pull_weights(
    flags: PullFlags, environment: Environment, resolved: ResolvedProfile, places: Places
) -> ExitStatus:
    """Converts the weights of a repository. Returns the exit status."""
    file_type = find_file_type(flags.convert or "").name
    # The weights of Qwen/QwQ-32B-GGUF are in Qwen/QwQ-32B.
    repo = flags.repo or re.sub(r"-GGUF$", "", resolved.profile.repo)
    out = flags.out or make_private(places.converted) / f"{repo.rpartition('/')[2]}-{file_type}.gguf"
    screen = WeightsScreen(Output.of(environment.stderr, environment.variables))
    if out.exists():
        screen.say(f"{out} is here already. Remove it to make it anew, or choose another --out.")
        return ExitStatus.ANSWERED
    registry = places.registry
    puller = Puller(Hub(TransferSettings()), places.hub_cache, is_verified=registry.read().is_verified)
    own = HubCache(make_private(places.directories.cache) / "weights")
    request = ConvertRequest(Path(repo), file_type, out, imatrix=flags.imatrix)
    try:
        keeping = ShardCaches(places.hub_cache, own, flags.keep_weights)
        with closing(screen), closing(convert_weights(puller, repo, request, keeping)) as events:
            for event in events:
                screen.show_weights(event)
    except KeyboardInterrupt:
        screen.say("stopped; what came and what is converted is kept. The same command goes on from there.")
        return ExitStatus.INTERRUPTED
    name, now = out.stem, time.time()
    facts = {"alias": name, "origin": "convert", "file_type": file_type, "repo": repo, "added_at": now}
    registry.change(lambda state: state.with_verified(out, sha256="", **facts))
    screen.say(f'{name} is ready: {out}. Try: qwq ask --model {name} "How many r\'s are in strawberry?"')
    return ExitStatus.ANSWERED


class WeightsScreen(PullScreen):
    """One line for both: how far the conversion is, and which shard is being downloaded."""

    _planned = ShardsPlanned(0, 0, 0)
    _arriving = FileStarted("", 0, 1, 0, 0)
    _arrived = _converted = 0
    _tensor = "waiting"

    def show_weights(self, event: WeightsEvent) -> None:
        """Shows one event."""
        match event:
            case ShardsPlanned():
                self._planned = event
                sizes = f"{decimal_size(event.bytes_total)} become {decimal_size(event.output_bytes)}"
                self.say(f"{plural(event.count, 'shard')}, {sizes}: all headers are checked.")
                self.start(event.output_bytes)
            case ConversionResumed():
                self._converted = event.bytes_done
                size = decimal_size(event.bytes_done, 2)
                self.say(f"going on: {event.count} tensors ({size}) are there already.")
                self.start(self._planned.output_bytes, event.bytes_done)
            case ConversionRestarted():
                self.say(f"{event.path} was of another conversion: starting over.")
            case RowsWritten():
                self._tensor, self._converted = event.name, event.bytes_done
                self._draw()
            case FileStarted():
                self._arriving, self._arrived = event, event.here
                self._draw()
            case BytesReceived():
                self._arrived = event.done
                self._draw()
            case FileDone():
                self._arrived = self._arriving.n_bytes
                self._draw()
            case ConversionDone():
                self.say(f"{event.paths[0]}: {decimal_size(event.n_bytes, 2)}, whole and checked.")
            case TensorDone() | ConversionPlanned():
                pass
            case _:
                self.show(event)

    def _draw(self) -> None:
        shard = f"{self._arriving.name}: {self._arrived / GB:.2f} / {self._arriving.n_bytes / GB:.2f} GB"
        self.update(f"{self._tensor} · {shard}", self._converted)
