/* A canned engine: answers as vLLM does, at a speed that no model has, so that a router is what is measured.
 *
 *     engine --port 9000 --engines 4 --events 100 --pace-ms 20
 *
 * In: HTTP/1.1 on consecutive ports of 127.0.0.1. POST (any path) is an inference: with `"stream":true` it
 * gets `--events` server-sent events (`max_tokens` where the request names it), the first after `--first-ms`,
 * one write an event, one each `--pace-ms`, as an engine's decode steps would bring them; otherwise some 600
 * bytes of JSON at once. The usage chunk comes where `include_usage` is asked for. GET: /health, /v1/models,
 * /metrics (vLLM's names; `--blocks` is the KV cache that it tells), and empty JSON for what other routers
 * ask.
 * Out: a line "listening" on standard output once every port is open; SIGTERM ends it.
 * Must not: look at a prompt, hold more than BODY_BYTES_MAX of a request, or take chunked bodies (411).
 */
#include "common.h"

enum { DESCRIPTORS_MAX = 65536, HEAD_BYTES_MAX = 65536, BODY_BYTES_MAX = 16 << 20, ENGINES_MAX = 64 };
enum { BATCH = 256, READ_BYTES = 65536 };

struct connection {
    bool open;
    int engine;
    uint32_t serial; /* tells a timer that its connection is gone and the descriptor is another's */
    char *input;
    size_t input_length, input_capacity;
    char *output; /* what the socket did not take at once */
    size_t output_length, output_sent, output_capacity;
    bool streaming, include_usage;
    int events_sent, events_total;
};

struct timer {
    int64_t due;
    int descriptor;
    uint32_t serial;
};

struct engine {
    int port;
    int64_t requests, events, running, aborted;
};

static double port_option = 9000, engines_option = 1, events_option = 100, pace_option = 20, first_option = 0;
static double blocks_option = 65536;
static const char *model = "chat";

static struct connection *connections;
static struct engine engines[ENGINES_MAX];
static int listener_engine[DESCRIPTORS_MAX]; /* 1 + engine for listening sockets */
static struct timer *timers;
static size_t timer_count, timer_capacity;
static int poll_descriptor;

static char whole_answer[2048];
static size_t whole_answer_length;
static char stream_head[512];
static size_t stream_head_length;

/* ---- timers: a binary heap by due time ---- */

static void push_timer(struct timer added) {
    if (timer_count == timer_capacity) {
        timer_capacity = timer_capacity ? timer_capacity * 2 : 1024;
        timers = realloc(timers, timer_capacity * sizeof *timers);
        if (timers == NULL) fail("memory", "out of it");
    }
    size_t at = timer_count++;
    for (; at > 0 && timers[(at - 1) / 2].due > added.due; at = (at - 1) / 2)
        timers[at] = timers[(at - 1) / 2];
    timers[at] = added;
}

static struct timer pop_timer(void) {
    struct timer first = timers[0], last = timers[--timer_count];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < timer_count; at = child) {
        if (child + 1 < timer_count && timers[child + 1].due < timers[child].due) child++;
        if (timers[child].due >= last.due) break;
        timers[at] = timers[child];
    }
    timers[at] = last;
    return first;
}

/* ---- output ---- */

static void close_connection(int descriptor) {
    struct connection *it = &connections[descriptor];
    if (it->streaming) {
        engines[it->engine].running--;
        engines[it->engine].aborted++;
    }
    it->open = it->streaming = false;
    it->serial++;
    it->input_length = it->output_length = it->output_sent = 0;
    close(descriptor);
}

static void send_bytes(int descriptor, const char *bytes, size_t length) {
    struct connection *it = &connections[descriptor];
    if (it->output_length == it->output_sent) {
        ssize_t sent = send(descriptor, bytes, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            return; /* the peer has gone: its end of file closes the connection */
        if (sent < 0) sent = 0;
        if ((size_t)sent == length) return;
        bytes += sent;
        length -= (size_t)sent;
        it->output_length = it->output_sent = 0;
        watch(poll_descriptor, EPOLL_CTL_MOD, descriptor, EPOLLIN | EPOLLOUT);
    }
    if (it->output_length + length > it->output_capacity) {
        it->output_capacity = it->output_length + length + 4096;
        it->output = realloc(it->output, it->output_capacity);
        if (it->output == NULL) fail("memory", "out of it");
    }
    memcpy(it->output + it->output_length, bytes, length);
    it->output_length += length;
}

static void flush(int descriptor) {
    struct connection *it = &connections[descriptor];
    ssize_t sent =
        send(descriptor, it->output + it->output_sent, it->output_length - it->output_sent, MSG_NOSIGNAL);
    if (sent > 0) it->output_sent += (size_t)sent;
    if (it->output_sent == it->output_length) watch(poll_descriptor, EPOLL_CTL_MOD, descriptor, EPOLLIN);
}

/* Appends one chunk of the chunked coding that holds `data: TEXT` and returns the new length. */
static size_t append_event(char *output, size_t at, const char *text) {
    size_t length = strlen(text) + 8; /* "data: " and two line ends */
    return at + (size_t)sprintf(output + at, "%zx\r\ndata: %s\n\n\r\n", length, text);
}

static void send_event(int descriptor) {
    struct connection *it = &connections[descriptor];
    char output[4096], text[1024];
    size_t length = 0;
    bool first = it->events_sent == 0, last = it->events_sent + 1 == it->events_total;
    if (first) {
        memcpy(output, stream_head, stream_head_length);
        length = stream_head_length;
    }
    snprintf(
        text, sizeof text,
        "{\"id\":\"chatcmpl-8f14e45fceea167a5a36dedd4bea2543\",\"object\":\"chat.completion.chunk\","
        "\"created\":1764201600,\"model\":\"%s\",\"choices\":[{\"index\":0,\"delta\":{%s},\"logprobs\":null,"
        "\"finish_reason\":%s,\"token_ids\":null}]}",
        model, first ? "\"role\":\"assistant\",\"content\":\"\"" : "\"content\":\" water\"",
        last ? "\"length\"" : "null"
    );
    length = append_event(output, length, text);
    it->events_sent++;
    engines[it->engine].events++;
    if (last) {
        if (it->include_usage) {
            snprintf(
                text, sizeof text,
                "{\"id\":\"chatcmpl-8f14e45fceea167a5a36dedd4bea2543\",\"object\":\"chat.completion.chunk\","
                "\"created\":1764201600,\"model\":\"%s\",\"choices\":[],\"usage\":{\"prompt_tokens\":500,"
                "\"total_tokens\":%d,\"completion_tokens\":%d}}",
                model, 500 + it->events_total, it->events_total
            );
            length = append_event(output, length, text);
        }
        length = append_event(output, length, "[DONE]");
        length += (size_t)sprintf(output + length, "0\r\n\r\n");
        it->streaming = false;
        engines[it->engine].running--;
    }
    send_bytes(descriptor, output, length);
}

/* ---- requests ---- */

static void send_page(int descriptor, const char *type, const char *body) {
    char output[8192];
    int length = snprintf(
        output, sizeof output,
        "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: %s\r\n\r\n%s",
        strlen(body), type, body
    );
    send_bytes(descriptor, output, (size_t)length);
}

static void send_metrics(int descriptor) {
    const struct engine *engine = &engines[connections[descriptor].engine];
    char page[4096];
    snprintf(
        page, sizeof page,
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\",model_name=\"%s\"} "
        "%lld\n"
        "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine=\"0\",model_name=\"%s\"} "
        "0\n"
        "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine=\"0\",model_name=\"%s\"} "
        "0.1\n"
        "# TYPE vllm:request_success_total counter\n"
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"%s\"} %lld\n"
        "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"%s\"} %lld\n"
        "# TYPE vllm:generation_tokens_total counter\n"
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"%s\"} %lld\n"
        "# TYPE vllm:cache_config_info gauge\n"
        "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"%d\",enable_prefix_caching=\"True\","
        "engine=\"0\"} 1.0\n",
        model, (long long)engine->running, model, model, model, (long long)engine->requests, model,
        (long long)engine->aborted, model, (long long)engine->events, (int)blocks_option
    );
    send_page(descriptor, "text/plain; version=0.0.4", page);
}

static void answer_get(int descriptor, const char *path) {
    char body[512];
    if (strncmp(path, "/health", 7) == 0) {
        send_page(descriptor, "text/plain", "");
    } else if (strncmp(path, "/metrics", 8) == 0) {
        send_metrics(descriptor);
    } else if (strncmp(path, "/v1/models", 10) == 0) {
        snprintf(
            body, sizeof body,
            "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1764201600,"
            "\"owned_by\":\"vllm\",\"root\":\"%s\",\"parent\":null,\"max_model_len\":32768}]}",
            model, model
        );
        send_page(descriptor, "application/json", body);
    } else if (strncmp(path, "/version", 8) == 0) {
        send_page(descriptor, "application/json", "{\"version\":\"0.32.0\"}");
    } else {
        send_page(descriptor, "application/json", "{}");
    }
}

static bool contains(const char *text, size_t length, const char *wanted) {
    return memmem(text, length, wanted, strlen(wanted)) != NULL;
}

static void answer_post(int descriptor, const char *body, size_t length) {
    struct connection *it = &connections[descriptor];
    engines[it->engine].requests++;
    if (!contains(body, length, "\"stream\":true") && !contains(body, length, "\"stream\": true")) {
        send_bytes(descriptor, whole_answer, whole_answer_length);
        return;
    }
    const char *wanted = memmem(body, length, "\"max_tokens\":", 13);
    it->events_total = wanted == NULL ? (int)events_option : atoi(wanted + 13);
    if (it->events_total < 1) it->events_total = 1;
    it->include_usage =
        contains(body, length, "\"include_usage\":true") || contains(body, length, "\"include_usage\": true");
    it->events_sent = 0;
    it->streaming = true;
    engines[it->engine].running++;
    push_timer((struct timer){.due =
                                  now_nanoseconds() + (int64_t)(first_option * NANOSECONDS_PER_MILLISECOND),
                              .descriptor = descriptor,
                              .serial = it->serial});
}

/* Answers one complete request at the start of the input; returns its length, or 0 where there is none. */
static size_t take_request(int descriptor) {
    struct connection *it = &connections[descriptor];
    size_t head = head_length(it->input, it->input_length);
    if (head == 0) {
        if (it->input_length > HEAD_BYTES_MAX) fail("request", "its head is too long");
        return 0;
    }
    if (strncmp(it->input, "GET ", 4) == 0) {
        answer_get(descriptor, it->input + 4);
        return head;
    }
    const char *given = header_value(it->input, head, "content-length");
    if (given == NULL) {
        static const char refusal[] = "HTTP/1.1 411 Length Required\r\ncontent-length: 0\r\n\r\n";
        send_bytes(descriptor, refusal, sizeof refusal - 1);
        return head;
    }
    size_t body = (size_t)strtoull(given, NULL, 10);
    if (body > BODY_BYTES_MAX) fail("request", "its body is too long");
    if (it->input_length < head + body) return 0;
    answer_post(descriptor, it->input + head, body);
    return head + body;
}

static void take_requests(int descriptor) {
    struct connection *it = &connections[descriptor];
    size_t taken;
    /* A stream ends before the next request on its connection is looked at. */
    while (it->open && !it->streaming && it->input_length > 0 && (taken = take_request(descriptor)) > 0) {
        memmove(it->input, it->input + taken, it->input_length - taken);
        it->input_length -= taken;
    }
}

static void on_readable(int descriptor) {
    struct connection *it = &connections[descriptor];
    if (it->input_length > HEAD_BYTES_MAX + BODY_BYTES_MAX)
        fail("connection", "sends before it has been answered");
    if (it->input_capacity - it->input_length < READ_BYTES) {
        it->input_capacity = it->input_capacity * 2 + READ_BYTES;
        it->input = realloc(it->input, it->input_capacity);
        if (it->input == NULL) fail("memory", "out of it");
    }
    ssize_t got = recv(descriptor, it->input + it->input_length, READ_BYTES, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        close_connection(descriptor);
        return;
    }
    it->input_length += (size_t)got;
    take_requests(descriptor);
}

static void on_due(struct timer due) {
    struct connection *it = &connections[due.descriptor];
    if (!it->open || it->serial != due.serial) return;
    send_event(due.descriptor);
    if (it->streaming) {
        due.due += (int64_t)(pace_option * NANOSECONDS_PER_MILLISECOND);
        push_timer(due);
    } else {
        take_requests(due.descriptor);
    }
}

/* ---- life ---- */

static void accept_all(int listener) {
    for (;;) {
        int descriptor = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (descriptor < 0) return;
        if (descriptor >= DESCRIPTORS_MAX) fail("connections", "too many");
        make_prompt(descriptor);
        connections[descriptor].open = true;
        connections[descriptor].engine = listener_engine[listener] - 1;
        watch(poll_descriptor, EPOLL_CTL_ADD, descriptor, EPOLLIN);
    }
}

static void open_listeners(void) {
    for (int number = 0; number < (int)engines_option; number++) {
        engines[number].port = (int)port_option + number;
        int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        struct sockaddr_in address = loopback(engines[number].port);
        if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0) fail("bind", strerror(errno));
        if (listen(listener, 1024) != 0) fail("listen", strerror(errno));
        listener_engine[listener] = number + 1;
        watch(poll_descriptor, EPOLL_CTL_ADD, listener, EPOLLIN);
    }
    printf("listening\n");
    fflush(stdout);
}

static void prepare_answers(void) {
    char body[1024];
    int length = snprintf(
        body, sizeof body,
        "{\"id\":\"chatcmpl-8f14e45fceea167a5a36dedd4bea2543\",\"object\":\"chat.completion\","
        "\"created\":1764201600,\"model\":\"%s\",\"choices\":[{\"index\":0,\"message\":{\"role\":"
        "\"assistant\","
        "\"content\":\"A millrace is the channel that carries the stream to the wheel of a mill, and the "
        "tail "
        "race carries it away again.\",\"refusal\":null,\"annotations\":null,\"audio\":null,"
        "\"function_call\":null,\"tool_calls\":[],\"reasoning\":null},\"logprobs\":null,"
        "\"finish_reason\":\"stop\",\"stop_reason\":null,\"token_ids\":null}],\"service_tier\":null,"
        "\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":500,\"total_tokens\":528,"
        "\"completion_tokens\":28},\"prompt_logprobs\":null,\"prompt_token_ids\":null}",
        model
    );
    whole_answer_length = (size_t)snprintf(
        whole_answer, sizeof whole_answer,
        "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
        "content-type: application/json\r\n\r\n%s",
        length, body
    );
    stream_head_length = (size_t)snprintf(
        stream_head, sizeof stream_head,
        "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
        "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    );
}

int main(int count, char **words) {
    const struct option_spec known[] = {
        {"--port", NULL, &port_option},      {"--engines", NULL, &engines_option},
        {"--events", NULL, &events_option},  {"--pace-ms", NULL, &pace_option},
        {"--first-ms", NULL, &first_option}, {"--blocks", NULL, &blocks_option},
        {"--model", &model, NULL},           {NULL, NULL, NULL}
    };
    read_options(count, words, known);
    if (engines_option < 1 || engines_option > ENGINES_MAX) fail("--engines", "between 1 and 64");
    raise_descriptor_limit();
    connections = allocate(DESCRIPTORS_MAX * sizeof *connections);
    poll_descriptor = epoll_create1(EPOLL_CLOEXEC);
    prepare_answers();
    open_listeners();
    struct epoll_event events[BATCH];
    for (;;) {
        int64_t wait = timer_count > 0 ? timers[0].due - now_nanoseconds() : NANOSECONDS_PER_SECOND;
        if (wait < 0) wait = 0;
        struct timespec limit = {wait / NANOSECONDS_PER_SECOND, wait % NANOSECONDS_PER_SECOND};
        int ready = epoll_pwait2(poll_descriptor, events, BATCH, &limit, NULL);
        for (int at = 0; at < ready; at++) {
            int descriptor = events[at].data.fd;
            if (listener_engine[descriptor]) {
                accept_all(descriptor);
                continue;
            }
            if (connections[descriptor].open && (events[at].events & EPOLLOUT)) flush(descriptor);
            if (connections[descriptor].open && (events[at].events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
                on_readable(descriptor);
        }
        int64_t now = now_nanoseconds();
        while (timer_count > 0 && timers[0].due <= now) on_due(pop_timer());
    }
}
