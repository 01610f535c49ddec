# pyright: reportUnknownMemberType=false
"""A video file through libav: the index of its frames, and chosen ones decoded.

Runs in the decoding process only (see :mod:`decoder_process`), so it imports PyAV as it loads.
"""

import gc
import json
import os
import struct
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, cast

import av
from av import Packet
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mlx_onevision.errors import RequestError
from mlx_onevision.files import sniff
from mlx_onevision.media.frame_sampling import FrameOptions, frames_between, select_frames
from mlx_onevision.media.sources import VIDEO_KINDS

Json: TypeAlias = dict[str, Any]
Send: TypeAlias = Callable[..., None]

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,ogg"
SEEKABLE = ("mov", "matroska", "avi")
SEEK_GAP = 16  # frames; to skip fewer, decoding on is quicker than seeking
MAX_FRAMES = 4_000_000  # of one file: 37 hours at 30 a second
THREAD_BYTES = 128 << 20  # of frames that decoding threads hold at once, roughly
THUMBNAIL = 64  # pixels, across and down at most
ATTACHED_PICTURE = 0x400
# Boxes of MP4 and MOV: what holds others, and where behind its head a number of frames stands.
HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
MAX_BOXES = 20_000  # that are looked at
SEQUENCES = (b"avis", b"msf1", b"hevc", b"hevx")  # major brands of animated AVIF and HEIF


class Refusal(Exception):
    """``text`` : for the caller. ``kind`` : of the error that it becomes."""

    def __init__(self, text: str, kind: str = "media") -> None:
        super().__init__(text)
        self.kind = kind


class Key(NamedTuple):
    """A key frame: its place in display order, and the stamp to seek to."""

    place: int
    seek: int


class Index(NamedTuple):
    """Every frame of a file, in display order.

    stamps : when each appears, in ticks of the stream's clock. times : in seconds, from 0.
    length : seconds, until the last one disappears.
    keys : the key frames.
    counted : whether the stamps are numbers of frames, because the container's own are unusable.
    missing : frames that the container declares behind the file's end.
    """

    stamps: list[int]
    times: list[float]
    length: float
    keys: list[Key]
    counted: bool
    missing: int


def serve(request: Json, send: Send, renew: Callable[[float], None]) -> None:
    """Sends a message about the video, and then the answer to each command. Raises Refusal.

    renew : called before each answer with additional seconds of processor time; sets its limit.
    """
    container, stream = _open_video(request)
    index = _read_index(container, stream)
    total = len(index.stamps)
    info = {"total": total, "length": index.length}
    info |= {"claimed": total + index.missing, "codec": stream.codec_context.name}
    container.close()
    send("video", info)
    with os.fdopen(request["commands"], encoding="utf-8") as commands:
        for line in commands:
            command = json.loads(line)
            thumbnails = command["do"] == "thumbnails"
            if not request["once"]:
                renew(index.length if thumbnails else 0.0)
            answer = _send_thumbnails if thumbnails else _send_frames
            try:
                answer(request, index, command, send)
            except RequestError as error:
                raise Refusal(str(error), "request") from None
            send("end", {})


def _send_thumbnails(request: Json, index: Index, command: Json, send: Send) -> None:
    part = frames_between(index.times, index.length, FrameOptions(**command["options"]))
    matrix = None
    for number, frame, small in _thumbnails(request, index, part.start, part.stop):
        matrix = matrix or _matrix(frame)  # of a video; that of each frame takes longer
        _send_frame(send, small, matrix, place=number, time=index.times[number])


def _send_frames(request: Json, index: Index, command: Json, send: Send) -> None:
    options = FrameOptions(**command["options"])
    chosen = select_frames(index.times, index.length, options, command["default"])
    if command["most"] is not None and len(chosen) > command["most"]:
        raise Refusal(str(len(chosen)), "too_many")
    send("chosen", {"indices": chosen, "times": [index.times[i] for i in chosen]})
    for place, frame in _chosen_frames(request, index, chosen):
        plain = frame.reformat(format="rgb24", dst_color_range="JPEG", threads=1)
        _send_frame(send, plain, _matrix(frame), place=place)
        del frame, plain
        gc.collect()  # see _matrix


def _send_frame(send: Send, frame: VideoFrame, matrix: list[int], **about: Any) -> None:
    plane = frame.planes[0]
    size = {"wide": frame.width, "high": frame.height, "stride": plane.line_size}
    about |= {**size, "matrix": matrix, "bytes": plane.buffer_size}
    send("frame", about, memoryview(plane))


def _matrix(frame: VideoFrame) -> list[int]:
    """The signs (a, b, c, d) of a frame's display matrix, x' = ax + cy and y' = bx + dy, rounded to
    a quarter turn. Reading side data leaves it in a reference cycle with the frame and its pixels.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return [1, 0, 0, 1]
    a, b, _, c, d = struct.unpack("5i", bytes(data)[:20])
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    return [(n > 0) - (n < 0) for n in ((0, b, c, 0) if turned else (a, 0, 0, d))]


def _open_video(request: Json) -> tuple[InputContainer, VideoStream]:
    file = os.fdopen(os.dup(0), "rb", buffering=0)
    _refuse_image(os.pread(0, 32, 0))
    if _claimed_frames() > MAX_FRAMES:
        raise Refusal(f"it has more than {MAX_FRAMES:,} frames", "too_large")
    file.seek(0)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    try:
        container = av.open(file, "r", options=options, buffer_size=1 << 18)
    except FFmpegError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        kinds = f"it is damaged, or no video of the kinds that are read ({VIDEO_KINDS})"
        raise Refusal(f"{kinds}: {reason}") from None
    streams = [s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE]
    if not streams:
        sound = " only sound" if container.streams.audio else " no video"
        raise Refusal(f"there is{sound} in it")
    stream = streams[0]
    context = stream.codec_context
    if not context or not context.name:  # libav has no decoder for it
        raise Refusal("its codec is not known")
    pixels = context.width * context.height
    _check_size(context.width, context.height, request["max_pixels"])
    # What the decoder itself refuses; it counts the margins of its buffers, too.
    context.options = {"max_pixels": str(2 * request["max_pixels"] + (1 << 16))}
    context.thread_type = "AUTO"
    # Each thread holds a frame of its own or more.
    context.thread_count = max(1, min(request["threads"], THREAD_BYTES // max(pixels * 6, 1)))
    return container, stream


def _refuse_image(head: bytes) -> None:
    """Refusal for a file that begins as an image, except for animations that libav reads."""
    if head[:3] == b"GIF" or head[8:12] in SEQUENCES or sniff(head) != "image":
        return
    if head[12:16] == b"VP8X" and head[20] & 2:
        raise Refusal(
            "it is an animated WebP, of which only the first frame is read, as an image; "
            f"to have all of it, convert it to one of {VIDEO_KINDS}"
        )
    raise Refusal("it is an image, not a video; give it as an image (--image, images=)")


def _claimed_frames() -> int:
    """The frames that an MP4's tables declare. A kilobyte can declare millions, for each of which
    libav would allocate an index entry.
    """
    size, claimed, seen = os.fstat(0).st_size, 0, 0
    waiting = [(0, size)]
    while waiting:
        place, end = waiting.pop()
        while place + 8 <= end and seen < MAX_BOXES:
            seen += 1
            head = os.pread(0, 20, place)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            begin = place + 8
            if length == 1:  # 64 bits of length follow the kind
                length, begin = int.from_bytes(head[8:16], "big"), place + 16
            stop = min(end, place + length) if length else end
            if stop <= begin:
                break
            if kind in HOLDERS:
                waiting.append((begin, stop))
            elif kind in COUNTS:
                claimed += int.from_bytes(os.pread(0, 4, begin + COUNTS[kind]), "big")
            place = stop
    return claimed


def _check_size(wide: int, high: int, most: int) -> None:
    if wide * high > most:
        raise Refusal(f"its frames are {wide}x{high} pixels", "too_large")


def _read_index(container: InputContainer, stream: VideoStream) -> Index:
    """Reads every packet's stamp, and decodes none."""
    stamps: list[int] = []
    order: list[tuple[int, int]] = []  # stamp and seek stamp of key frames
    counted = container.format.name == "avi"  # its stamps are in decoding order, not display order
    last = hidden = 0
    broken = False
    try:
        for packet in container.demux(stream):
            broken = broken or packet.is_corrupt
            if packet.size == 0 or packet.is_discard:  # the end of the file; cut by an edit list
                hidden += packet.is_discard
                continue
            place = packet.dts if packet.dts is not None else packet.pts
            stamp = place if counted else packet.pts
            if stamp is None:
                if not counted and stamps:
                    continue  # part of a frame, or garbage
                counted, stamp = True, len(stamps)
            if packet.is_keyframe:
                order.append((stamp, stamp if place is None else place))
            stamps.append(stamp)
            last = packet.duration or last
            if len(stamps) > MAX_FRAMES:
                raise Refusal(f"it has more than {MAX_FRAMES:,} frames", "too_large")
    except FFmpegError:
        broken = True  # the frames before are used
    if not stamps:
        raise Refusal("there is no frame in it")
    # An AVI's empty frames are counted, and have no packet.
    seen = max(len(stamps) + hidden, stamps[-1] + 1 if counted else 0)
    missing = max(0, stream.frames - seen)
    if not broken and not _ends_early(container, stream):
        missing = 0
    stamps = sorted(set(stamps))
    places = {stamp: n for n, stamp in enumerate(stamps)}
    keys = sorted(Key(places[stamp], seek) for stamp, seek in order)
    tick = stream.time_base or Fraction(1, 1)
    if not last:
        last = (stamps[-1] - stamps[0]) // max(len(stamps) - 1, 1) or 1
    zero = float(stamps[0] * tick)
    start = cast("int | None", container.start_time)  # PyAV's stub leaves None out
    if not counted and start is not None:
        # The container's clock, in whole microseconds; sound may start earlier than the video.
        started = start / 1_000_000
        zero = started if started < zero - 1e-6 else zero
    length = float((stamps[-1] + last) * tick) - zero
    times = [float(stamp * tick) - zero for stamp in stamps]
    return Index(stamps, times, length, keys, counted, missing)


def _ends_early(container: InputContainer, stream: VideoStream) -> bool:
    """Whether the container's index points behind the file's end. Reading a file that is cut
    between two frames ends without an error.
    """
    size = os.fstat(0).st_size
    if container.format.name == "avi":
        (form,) = struct.unpack("<I", os.pread(0, 4, 4))
        return size < 8 + form
    entries = stream.index_entries
    return any(entry.pos + entry.size > size for entry in entries)


def _chosen_frames(
    request: Json, index: Index, chosen: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """(position in ``chosen``, frame) for those that can be decoded."""
    container, stream = _open_video(request)
    seekable = _is_seekable(container, stream, index)
    shown = _shown(container.demux(stream), stream, index, 0)
    reached = -1  # index of the frame that came last
    place = 0
    while place < len(chosen):
        wanted = chosen[place]
        key = _key_before(index, wanted)
        if seekable and key.place - reached > SEEK_GAP:
            landed = _seek(container, stream, index, key)
            if landed is None:  # seeking went elsewhere: read from the start, and never seek again
                container, stream = _open_video(request)
                seekable, shown = False, _shown(container.demux(stream), stream, index, 0)
            else:
                shown = landed
        number, frame = next((item for item in shown if item[0] >= wanted), (-1, None))
        if frame is None:
            break  # the rest cannot be decoded
        _check_size(frame.width, frame.height, request["max_pixels"])
        reached = number
        while place < len(chosen) and chosen[place] < number:
            place += 1  # cannot be decoded
        while place < len(chosen) and chosen[place] == number:  # one may be chosen twice
            yield place, frame
            place += 1
    container.close()  # now, not at the next collection of cycles: a long video's index is large


def _thumbnails(
    request: Json, index: Index, first: int, last: int
) -> Iterator[tuple[int, VideoFrame, VideoFrame]]:
    """(index, frame, thumbnail) of the decodable frames from ``first`` to before ``last``. For
    speed, thumbnails are sampled, not averaged, and non-reference frames are not deblocked.
    """
    container, stream = _open_video(request)
    quick = {"skip_loop_filter": "noref"}
    stream.codec_context.options = {**stream.codec_context.options, **quick}
    key, shown = _key_before(index, first), None
    if key.place > SEEK_GAP and _is_seekable(container, stream, index):
        shown = _seek(container, stream, index, key)
        if shown is None:
            container, stream = _open_video(request)
    reformatter = VideoReformatter()  # one for all, which keeps its scaler; each frame has its own
    for number, frame in shown or _shown(container.demux(stream), stream, index, 0):
        if number >= last:
            return
        if number < first:  # or out of order after damage
            continue
        first = number + 1
        _check_size(frame.width, frame.height, request["max_pixels"])
        small = reformatter.reformat(
            frame,
            width=max(2, min(frame.width, THUMBNAIL)),
            height=max(2, min(frame.height, THUMBNAIL)),
            format="rgb24",
            dst_color_range="JPEG",
            interpolation=Interpolation.POINT,
            threads=1,
        )
        yield number, frame, small


def _key_before(index: Index, number: int) -> Key:
    """The last key frame up to a frame; the beginning of the file where there is none."""
    before = bisect_right(index.keys, (number, sys.maxsize))
    return index.keys[before - 1] if before else Key(0, 0)


def _is_seekable(container: InputContainer, stream: VideoStream, index: Index) -> bool:
    if index.counted and stream.codec_context.has_b_frames:
        return False  # a key frame's number in decoding order is not that in display order
    return container.format.name.startswith(SEEKABLE)


def _seek(
    container: InputContainer, stream: VideoStream, index: Index, key: Key
) -> Iterator[tuple[int, VideoFrame]] | None:
    """Frames from a key frame on, or None where seeking does not lead there."""
    try:
        container.seek(key.seek, stream=stream, backward=True)
        stream.codec_context.flush_buffers()
        packets = container.demux(stream)
        packet = next(packets)
        if index.counted and packet.dts != key.seek:
            return None
        shown = _shown(chain((packet,), packets), stream, index, key.place)
        first = next(shown, None)
    except (FFmpegError, StopIteration):
        return None
    return None if first is None or first[0] > key.place else chain((first,), shown)


def _shown(
    packets: "Iterable[Packet[VideoStream]]", stream: VideoStream, index: Index, start: int
) -> Iterator[tuple[int, VideoFrame]]:
    """(index, frame) in display order. ``start`` : where counting begins, if stamps are counted."""
    number = start - 1
    for frame in _outputs(packets, stream):
        if index.counted:
            number += 1
        elif frame.pts is None:
            continue
        else:
            number = bisect_right(index.stamps, frame.pts) - 1
            if number < 0 or index.stamps[number] != frame.pts:
                continue  # cut by an edit list
        yield number, frame


def _outputs(packets: "Iterable[Packet[VideoStream]]", stream: VideoStream) -> Iterator[VideoFrame]:
    try:
        for packet in packets:
            try:
                yield from stream.decode(packet)
            except FFmpegError as error:
                if "memory" in str(error).lower():
                    raise MemoryError from None
    except FFmpegError:
        try:
            yield from stream.decode(None)
        except FFmpegError:
            return
