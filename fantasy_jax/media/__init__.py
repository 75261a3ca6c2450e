"""Reading and writing of images, audio and video; the only package that uses codecs."""

from fantasy_jax.media.audio import (
    AudioPart,
    AudioTrack,
    audio_part,
    audio_seconds,
    read_audio,
    read_audio_track,
    resample,
    stream_audio,
    write_audio,
)
from fantasy_jax.media.images import ContactSheet, check_sheet, encode_jpeg, read_image
from fantasy_jax.media.paths import video_format
from fantasy_jax.media.reading import VideoInfo, probe_video, read_video, stream_frames, stream_video
from fantasy_jax.media.writing import check_audio, write_video

__all__ = [
    "AudioPart",
    "AudioTrack",
    "ContactSheet",
    "VideoInfo",
    "audio_part",
    "audio_seconds",
    "check_audio",
    "check_sheet",
    "encode_jpeg",
    "probe_video",
    "read_audio",
    "read_audio_track",
    "read_image",
    "read_video",
    "resample",
    "stream_audio",
    "stream_frames",
    "stream_video",
    "video_format",
    "write_audio",
    "write_video",
]
