"""A web application (FastAPI, on asyncio or uvloop) that has other programs do the work.

    pip install fastapi uvicorn
    python examples/fastapi_converters.py [PORT]
    curl --data-binary @notes.txt http://127.0.0.1:8000/convert/sort

Each request runs a program: it is fed the body, and what it writes is the answer. One that fails is a 422 with its
complaint, one that takes too long a 504; either way nothing of it runs on, also when the server is stopped meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

import anyreap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECONDS = 2.0
CONVERTERS = {
    "gzip": ["gzip", "-c"],
    "gunzip": ["gzip", "-dc"],
    "sort": ["sort"],
    "slow": ["sh", "-c", "sleep 3600 & wait"],
}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One reaper for the life of the application, open to all requests."""
    policy = anyreap.Shutdown(grace=1, scope="group")  # a converter's own children, too
    async with anyreap.open_reaper(shutdown=policy) as reaper:
        app.state.reaper = reaper
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/convert/{name}")
async def convert(name: str, request: Request) -> Response:
    """Have a converter convert the body."""
    if name not in CONVERTERS:
        raise HTTPException(404, f"no such converter, only {', '.join(CONVERTERS)}")
    body = await request.body()
    reaper: anyreap.Reaper = request.app.state.reaper
    try:
        with anyio.fail_after(SECONDS):
            done = await reaper.run_process(CONVERTERS[name], input=body)
    except TimeoutError:
        raise HTTPException(504, f"{name} took longer than {SECONDS:g} s") from None
    except anyreap.ChildFailed as failed:
        raise HTTPException(422, f"{name} {failed.status}: {failed.stderr.decode(errors='replace')}") from None
    return Response(done.stdout, media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
