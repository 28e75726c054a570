"""What plug-ins may know of a request: part of the contract of picking, apart because it can be compiled.

In come the facts of a request that has been understood, out goes what filters, scorers and pickers read.
It is data only; whoever writes a plug-in finds it in `picking.contract`.
"""

from dataclasses import dataclass

from router.prefix.exact.tokens import ExactPrompt
from router.prefix.prompt import NO_PROMPT, Prompt


# Not frozen: that would triple the cost of making one, which every request pays. Why `__init__` is written
# out stands in `picking.candidate`.
@dataclass(init=False, slots=True)
class RequestContext:
    """What plug-ins may know of a request; nobody changes it once it is made.

    Attributes:
        request_id: Identifies it in logs.
        route: Path of the OpenAI route.
        namespace: Tenant.
        deployment: Deployment that it goes to.
        model: As the client named it.
        stream: True when the client asked for a stream.
        body: As it came; plug-ins read and never change it.
        prompt: Its length and hash chain; empty unless the strategy reads prompts.
        session: What the client calls its session; empty for none.
        adapter: LoRA adapter that it needs; empty for none.
        exact: The prompt in engines' own tokens; None where that is not known.
    """

    request_id: str
    route: str
    namespace: str
    deployment: str
    model: str
    stream: bool
    body: bytes
    prompt: Prompt
    session: str
    adapter: str
    exact: ExactPrompt | None

    def __init__(
        self,
        request_id: str,
        route: str,
        namespace: str,
        deployment: str,
        model: str,
        stream: bool,
        body: bytes,
        prompt: Prompt = NO_PROMPT,
        session: str = "",
        adapter: str = "",
        exact: ExactPrompt | None = None,
    ) -> None:
        self.request_id = request_id
        self.route = route
        self.namespace = namespace
        self.deployment = deployment
        self.model = model
        self.stream = stream
        self.body = body
        self.prompt = prompt
        self.session = session
        self.adapter = adapter
        self.exact = exact
