"""``POST /v1/files``: a file by itself, onto the disk. Requests name it by its ``url``, in place of
the data: so a video may be larger than what is held in memory of a request.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.errors import HTTPError, to_http_error
from mlx_onevision.plugins.hosts.http.operations import JSON, AppState, Operation
from mlx_onevision.plugins.hosts.http.request_body import (
    announced_length,
    check_encoding,
    content_type,
)
from mlx_onevision.plugins.hosts.http.response_types import DeletedUpload, UploadObject
from mlx_onevision.plugins.service.media_policy import UPLOAD_PREFIX
from mlx_onevision.plugins.service.spool import Receiver, Spool, Upload

PATH = "/v1/files"
WRITE_BLOCK_BYTES = 1 << 20  # bytes that are written at once
DISK_FULL_STATUS = 507  # status where the disk is full


async def upload(state: AppState, request: Request) -> Response:
    """Keeps the body on disk, and answers with its address."""
    spool = _spool(state)
    _check_head(request, spool)
    with spool.receive() as receiver:
        try:
            await _write(state, request, receiver)
        except PluginError as error:
            found = to_http_error(error)
            # As a refusal after which the rest of the body is not read.
            found.status = DISK_FULL_STATUS if error.code == "out_of_memory" else found.status
            raise found from None
    return JSONResponse(_body(receiver.upload), 201, {"Location": f"{PATH}/{receiver.upload.id}"})


async def _write(state: AppState, request: Request, receiver: Receiver) -> None:
    block = bytearray()
    async for piece in state.reader.pieces(request):
        block += piece
        if len(block) >= WRITE_BLOCK_BYTES:
            await state.blocking(lambda written=bytes(block): receiver.write(written))
            block.clear()

    def finish() -> None:
        receiver.write(block)
        receiver.finish()

    await state.blocking(finish)


def _check_head(request: Request, spool: Spool) -> None:
    kind = content_type(request)
    if kind.partition("/")[0] not in ("video", "image") and kind != "application/octet-stream":
        message = "the file itself has to be the body, of a type such as video/mp4"
        raise HTTPError(415, f"{message}; curl takes --data-binary @FILE and -H 'Content-Type: …'")
    check_encoding(request)
    length = announced_length(request)
    if length is not None and length > spool.max_file_bytes:
        size = f"{length / 2**20:,.0f} MB"
        hint = f"{spool.max_file_bytes / 2**20:,.0f} MB are taken (serve --max-upload)"
        raise HTTPError(413, f"the file has {size}; {hint}", "too_large")


async def retrieve(state: AppState, request: Request) -> Response:
    """Answers with a file that is kept. Raises HTTPError: 404 for any other."""
    return JSONResponse(_body(_found(state, request)))


async def delete(state: AppState, request: Request) -> Response:
    """Deletes a file, and answers that it did."""
    id = _found(state, request).id
    await state.blocking(lambda: _spool(state).delete(id))
    deleted: DeletedUpload = {"object": "file", "id": id, "deleted": True}
    return JSONResponse(deleted)


def _found(state: AppState, request: Request) -> Upload:
    try:
        return _spool(state).upload(request.path_params["id"])
    except PluginError as error:
        raise HTTPError(404, str(error), "not_found") from None


def _spool(state: AppState) -> Spool:
    assert state.uploads is not None  # else these routes are not there
    return state.uploads


def _body(upload: Upload) -> UploadObject:
    assert upload.kind is not None  # known at the end of the file
    return {
        "object": "file",
        "id": upload.id,
        "url": UPLOAD_PREFIX + upload.id,
        "kind": upload.kind,
        "bytes": upload.size,
    }


OPERATIONS = (
    Operation(
        "POST",
        PATH,
        upload,
        name="uploadFile",
        summary="An image or a video by itself, for requests that name its url",
        takes_file=True,
        gives={JSON: UploadObject},
        status=201,
        refuses=(507,),
    ),
    Operation(
        "GET",
        PATH + "/{id}",
        retrieve,
        name="retrieveFile",
        summary="A file that is kept",
        gives={JSON: UploadObject},
        refuses=(404,),
    ),
    Operation(
        "DELETE",
        PATH + "/{id}",
        delete,
        name="deleteFile",
        summary="Delete a file",
        gives={JSON: DeletedUpload},
        refuses=(404,),
    ),
)
"""Where the backend's media policy takes uploads."""
