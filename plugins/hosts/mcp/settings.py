"""What whoever starts the server decides; no call can change it. Standard library only."""

from dataclasses import dataclass, field

from mlx_onevision.plugins.service.media_policy import MediaPolicy

PIXELS = 110_000_000  # of a picture: those are the owner's own, and cameras make large ones
TIMEOUT = 50.0  # seconds; hosts cut a call off after 60


@dataclass(frozen=True)
class McpSettings:
    """How the server stands towards its host.

    policy : which files the tools read; the backend's own, too.
    timeout : seconds after which a call is answered, with what there is or with what to do instead.
    max_tokens : of one answer, at most.
    contract : whether the contract is offered, too, for hosts that are programs.
    values : how many values a message's JSON may hold.
    """

    policy: MediaPolicy = field(default_factory=MediaPolicy)
    timeout: float = TIMEOUT
    max_tokens: int = 4096
    contract: bool = False
    values: int = 500_000

    @property
    def longest(self) -> int:
        """Bytes of a message. Files are named by path; only the contract's requests hold them."""
        return 64 << 20 if self.contract else 1 << 20
