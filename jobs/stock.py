"""Stock: Ray Serve with nothing set and an application that does nothing, to be measured against.

With many connections the five requests that Serve gives a replica at a time are few, and it spends
its time on asking for room: the same application stands a second time, with room for 100.

python -m fellray.jobs.stock PORT
"""

import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from fellray.actors.session import ask_for_token, ray

ROOMY = "/roomy"


class Idle:
    """A deployment in its shortest form, which is its fastest too."""

    async def __call__(self, request: Any) -> dict[str, str]:
        """The same to everybody."""
        return {"status": "ok"}


def main() -> None:
    """See above; until SIGTERM."""
    port = int(sys.argv[1])
    ask_for_token()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    from ray import serve

    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        serve.run(serve.deployment(Idle).bind(), name="stock", route_prefix="/")
        roomy = serve.deployment(Idle, max_ongoing_requests=100)
        serve.run(roomy.bind(), name="roomy", route_prefix=ROOMY)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            print(f"nothing is served at http://127.0.0.1:{port}", flush=True)
            threading.Event().wait()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
