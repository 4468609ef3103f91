"""What TensorBoard's own reader finds in a run's event files."""

from pathlib import Path

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator


def board(folder: Path, *, forgets: bool = True) -> EventAccumulator:
    """`forgets`: leave out what an event takes back; TensorBoard's fast loader does not look at such events."""
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}, purge_orphaned_data=forgets).Reload()


def drawn(shown: EventAccumulator, tag: str) -> dict[int, float]:
    """A curve: step -> value; a step that is drawn twice fails."""
    points = [(event.step, event.tensor_proto.float_val[0]) for event in shown.Tensors(tag)]
    assert len(points) == len(dict(points)), f"{tag} has a step twice"
    return dict(points)


def curves_of(shown: EventAccumulator) -> set[str]:
    """The tags of all curves."""
    return set(shown.PluginTagToContent("scalars"))


def texts(shown: EventAccumulator, tag: str) -> dict[int, str]:
    """Step -> text."""
    found = [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown.Tensors(f"{tag}/text_summary")]
    assert len(found) == len(dict(found)), f"{tag} has a step twice"
    return dict(found)
