"""What not every backend can do is asked for only where it can."""

from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.results import Capability
from mlx_onevision.plugins.hosts.http.errors import HTTPFault
from mlx_onevision.plugins.hosts.http.serving import Serving


async def check_able(
    serving: Serving, wanted: GenerateRequest, *, logprobs: str, json_schema: str
) -> None:
    """Raises HTTPFault 400, by the name of the field that asked for what the backend does not
    claim.
    """
    named: dict[Capability, str] = {"logprobs": logprobs, "json_schema": json_schema}
    asked = {one: field for one, field in named.items() if getattr(wanted, one) is not None}
    if not asked:
        return
    info = await serving.blocking(serving.backend.info)
    for capability, field in asked.items():
        if capability not in info.capabilities:
            message = f"{field} is not supported by this model; leave it out"
            raise HTTPFault(400, message, param=field)
