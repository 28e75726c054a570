/* A load client: keeps connections busy with chat completions, checks every answer, and measures.
 *
 *     client --port 8080 --connections 32 --seconds 10 --prompt-bytes 2000 [--stream 1 --events 100]
 *
 * In: options, all about one target on 127.0.0.1. Closed loop: a connection sends its next request when it
 * has the whole answer to the last. Prompts: `--prompts` different ones in turn, in `--groups` groups that
 * share a first half (0 groups: nothing shared), each of `--prompt-bytes` bytes. `--ramp-ms` spreads the first
 * requests; `--rate` bounds the requests a second of all connections together (0: no bound).
 * Out: one line of JSON on standard output: answers, events, failures by kind, seconds from sending a request
 * to the first byte of its body, at percentiles (of requests sent after `--warmup-seconds`).
 * An answer fails unless it has status 200 and `--expect-bytes` bytes (whole), or `--events` events and the
 * end mark (stream). Must not: follow redirects, speak TLS, or go on against a target that is not there.
 */
#include "common.h"

enum { HEAD_BYTES_MAX = 16384, READ_BYTES = 262144, CONNECTIONS_MAX = 20000, BATCH = 512 };
enum { FAILURES_IN_A_ROW_MAX = 2000 };

enum state { WAITING, HEAD, BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };
enum failure { NONE, STATUS, LENGTH, MALFORMED, CLOSED, CONNECT, UNANSWERED, FAILURE_KINDS };
static const char *const failure_names[] = {"none",   "status",  "length",    "malformed",
                                            "closed", "connect", "unanswered"};

struct connection {
    int descriptor; /* -1 between two connections */
    enum state state;
    char *request;
    size_t request_sent;
    int64_t sent_at, first_byte_at, start_at;
    int status;
    bool close_after, chunked;
    char head[HEAD_BYTES_MAX];
    size_t head_length;
    uint64_t left;      /* of the body or of the chunk */
    size_t line_length; /* of the chunk-size line or the trailer line that is being read */
    int64_t body_bytes;
    int events;
    char last; /* last byte of the body so far */
    char tail[16];
};

static double port_option = 8080, connections_option = 32, seconds_option = 10, warmup_option = 1;
static double stream_option = 0, events_option = 100, expect_option = 0, prompts_option = 4096;
static double groups_option = 64, prompt_bytes_option = 2000, ramp_option = 0, patience_option = 30;
static double rate_option = 0;
static const char *model = "chat", *key = "none";

static struct connection *connections;
static int *connection_of; /* by descriptor */
static int *waiting; /* ring of connections that wait for their time, which only grows from one to the next */
static int waiting_first, waiting_count, connection_count;
static int64_t slots_given;
static int poll_descriptor;
static int64_t began, measured_from, ends;
static int64_t answers, measured_answers, events_total, failures[FAILURE_KINDS], failures_in_a_row,
    next_prompt;
static float *first_byte_seconds;
static size_t sample_count, sample_capacity;
static size_t request_length, group_at, number_at, head_bytes;
static char *template_text;
static int last_bad_status;

/* ---- requests ---- */

static void fill(char *text, size_t length, unsigned seed) {
    static const char *const words[] = {"water", "wheel", "stone", "grain", "river", "flour", "gear", "mill"};
    size_t at = 0;
    while (at < length) {
        seed = seed * 1103515245u + 12345u;
        const char *word = words[(seed >> 16) & 7];
        for (; *word != '\0' && at < length; word++) text[at++] = *word;
        if (at < length) text[at++] = ' ';
    }
}

/* Builds the request once; only the two numbers in it, of eight digits each, change from one to the next. */
static void prepare_template(void) {
    size_t half = (size_t)prompt_bytes_option / 2;
    if (half < 16) fail("--prompt-bytes", "at least 32");
    char *body = allocate(half * 2 + 1024), *system_text = allocate(half + 1),
         *user_text = allocate(half + 1);
    fill(system_text, half, 1);
    fill(user_text, half, 2);
    memcpy(system_text, "G0000000", 8);
    memcpy(user_text, "N0000000", 8);
    int length = sprintf(
        body,
        "{\"model\":\"%s\",\"messages\":[{\"role\":\"system\",\"content\":\"%s\"},{\"role\":\"user\","
        "\"content\":"
        "\"%s\"}],\"max_tokens\":%d,\"temperature\":0.7%s}",
        model, system_text, user_text, (int)events_option, stream_option != 0 ? ",\"stream\":true" : ""
    );
    template_text = allocate((size_t)length + 1024);
    head_bytes = (size_t)sprintf(
        template_text,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer %s\r\n"
        "content-type: application/json\r\naccept: */*\r\nuser-agent: millrace-bench\r\ncontent-length: "
        "%d\r\n\r\n",
        (int)port_option, key, length
    );
    memcpy(template_text + head_bytes, body, (size_t)length + 1);
    request_length = head_bytes + (size_t)length;
    group_at = (size_t)(strstr(template_text, "G0000000") - template_text);
    number_at = (size_t)(strstr(template_text, "N0000000") - template_text);
    free(body);
    free(system_text);
    free(user_text);
}

static void write_digits(char *at, int64_t number) {
    for (int digit = 7; digit >= 0; digit--, number /= 10) at[digit] = (char)('0' + number % 10);
}

static void prepare_request(struct connection *it) {
    int64_t number = next_prompt++ % (int64_t)prompts_option;
    write_digits(it->request + group_at, groups_option > 0 ? number % (int64_t)groups_option : number);
    write_digits(it->request + number_at, number);
    it->request_sent = 0;
}

/* ---- one connection ---- */

static void connect_to_target(struct connection *it) {
    it->descriptor = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (it->descriptor < 0) fail("socket", strerror(errno));
    make_prompt(it->descriptor);
    struct sockaddr_in address = loopback((int)port_option);
    if (connect(it->descriptor, (struct sockaddr *)&address, sizeof address) != 0 && errno != EINPROGRESS)
        fail("connect", strerror(errno));
    connection_of[it->descriptor] = (int)(it - connections);
    watch(poll_descriptor, EPOLL_CTL_ADD, it->descriptor, EPOLLIN | EPOLLOUT);
}

static void disconnect(struct connection *it) {
    if (it->descriptor >= 0) close(it->descriptor);
    it->descriptor = -1;
}

/* True while the request is not sent completely. */
static bool send_request(struct connection *it) {
    ssize_t sent =
        send(it->descriptor, it->request + it->request_sent, request_length - it->request_sent, MSG_NOSIGNAL);
    if (sent > 0) it->request_sent += (size_t)sent;
    return it->request_sent < request_length;
}

static void wait_until(struct connection *it, int64_t moment) {
    it->state = WAITING;
    it->start_at = moment;
    waiting[(waiting_first + waiting_count++) % connection_count] = (int)(it - connections);
}

static void begin_request(struct connection *it) {
    it->state = WAITING;
    if (now_nanoseconds() >= ends) {
        disconnect(it);
        return;
    }
    prepare_request(it);
    it->state = HEAD;
    it->head_length = it->line_length = 0;
    it->body_bytes = it->events = it->first_byte_at = 0;
    it->last = 0;
    memset(it->tail, 0, sizeof it->tail);
    it->sent_at = now_nanoseconds();
    if (it->descriptor < 0) {
        connect_to_target(it); /* sends when the connection stands */
    } else if (send_request(it)) {
        watch(poll_descriptor, EPOLL_CTL_MOD, it->descriptor, EPOLLIN | EPOLLOUT);
    }
}

static void begin_next(struct connection *it) {
    if (rate_option > 0) {
        wait_until(it, began + (int64_t)((double)slots_given++ / rate_option * NANOSECONDS_PER_SECOND));
    } else {
        begin_request(it);
    }
}

static void note_failure(struct connection *it, enum failure kind) {
    failures[kind]++;
    if (++failures_in_a_row > FAILURES_IN_A_ROW_MAX) fail("the target", "fails every request");
    disconnect(it);
    begin_next(it);
}

static void finish(struct connection *it) {
    bool whole = stream_option == 0;
    if (it->status != 200) {
        last_bad_status = it->status;
        note_failure(it, STATUS);
        return;
    }
    /* The end mark is an event of its own on the wire and not one that an engine computes. */
    bool complete = whole ? expect_option == 0 || it->body_bytes == (int64_t)expect_option
                          : it->events == (int)events_option + 1 &&
                                memmem(it->tail, sizeof it->tail, "[DONE]", 6) != NULL;
    if (!complete) {
        note_failure(it, LENGTH);
        return;
    }
    failures_in_a_row = 0;
    answers++;
    events_total += whole ? 0 : it->events - 1;
    if (it->sent_at >= measured_from) {
        measured_answers++;
        if (sample_count == sample_capacity) {
            sample_capacity = sample_capacity ? sample_capacity * 2 : 1 << 16;
            first_byte_seconds = realloc(first_byte_seconds, sample_capacity * sizeof *first_byte_seconds);
            if (first_byte_seconds == NULL) fail("memory", "out of it");
        }
        first_byte_seconds[sample_count++] =
            (float)((double)(it->first_byte_at - it->sent_at) / NANOSECONDS_PER_SECOND);
    }
    if (it->close_after) disconnect(it);
    begin_next(it);
}

/* ---- reading an answer: each step takes what it understands and says how much; -1: malformed ---- */

static void take_body(struct connection *it, const char *bytes, size_t length) {
    if (length == 0) return;
    if (it->body_bytes == 0) it->first_byte_at = now_nanoseconds();
    it->body_bytes += (int64_t)length;
    if (stream_option != 0) {
        const char *end = bytes + length;
        if (it->last == '\n' && bytes[0] == '\n') it->events++;
        for (const char *at = bytes; (at = memchr(at, '\n', (size_t)(end - at))) != NULL && ++at < end;)
            if (*at == '\n') it->events++;
        size_t keep = length < sizeof it->tail ? length : sizeof it->tail;
        memmove(it->tail, it->tail + keep, sizeof it->tail - keep);
        memcpy(it->tail + sizeof it->tail - keep, end - keep, keep);
    }
    it->last = bytes[length - 1];
}

static ssize_t take_head(struct connection *it, const char *bytes, size_t length) {
    size_t before = it->head_length, room = HEAD_BYTES_MAX - before, copied = length < room ? length : room;
    memcpy(it->head + before, bytes, copied);
    it->head_length += copied;
    size_t head = head_length(it->head, it->head_length);
    if (head == 0) return room == copied ? -1 : (ssize_t)copied;
    if (head < 12 || strncmp(it->head, "HTTP/1.", 7) != 0) return -1;
    it->status = atoi(it->head + 9);
    const char *coding = header_value(it->head, head, "transfer-encoding");
    const char *sized = header_value(it->head, head, "content-length");
    const char *connection = header_value(it->head, head, "connection");
    it->close_after = connection != NULL && strncasecmp(connection, "close", 5) == 0;
    it->chunked = coding != NULL && strncasecmp(coding, "chunked", 7) == 0;
    if (!it->chunked && sized == NULL) return -1;
    it->left = it->chunked ? 0 : strtoull(sized, NULL, 10);
    it->state = it->chunked ? CHUNK_SIZE : it->left > 0 ? BODY : WAITING;
    if (it->state == WAITING) it->first_byte_at = now_nanoseconds(); /* an empty body */
    it->head_length = 0;
    return (ssize_t)(head - before);
}

/* Chunk-size lines and trailer lines are short; they are gathered in the buffer of the head. */
static ssize_t take_line(struct connection *it, const char *bytes, size_t length) {
    const char *end = memchr(bytes, '\n', length);
    size_t taken = end == NULL ? length : (size_t)(end - bytes) + 1;
    if (it->line_length + taken >= HEAD_BYTES_MAX) return -1;
    memcpy(it->head + it->line_length, bytes, taken);
    it->line_length += taken;
    if (end == NULL) return (ssize_t)taken;
    it->head[it->line_length] = '\0';
    bool empty = it->line_length <= 2;
    it->line_length = 0;
    if (it->state == CHUNK_END) {
        it->state = CHUNK_SIZE;
        return empty ? (ssize_t)taken : -1;
    }
    if (it->state == TRAILER) {
        it->state = empty ? WAITING : TRAILER;
        return (ssize_t)taken;
    }
    char *after;
    it->left = strtoull(it->head, &after, 16);
    if (after == it->head) return -1;
    it->state = it->left > 0 ? CHUNK_DATA : TRAILER;
    return (ssize_t)taken;
}

static ssize_t take_data(struct connection *it, const char *bytes, size_t length) {
    size_t taken = length < it->left ? length : (size_t)it->left;
    take_body(it, bytes, taken);
    it->left -= taken;
    if (it->left == 0) it->state = it->state == BODY ? WAITING : CHUNK_END;
    return (ssize_t)taken;
}

/* Returns false where the bytes are no answer. WAITING marks the end of one. */
static bool take_answer(struct connection *it, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t taken;
        if (it->state == HEAD)
            taken = take_head(it, bytes, length);
        else if (it->state == BODY || it->state == CHUNK_DATA)
            taken = take_data(it, bytes, length);
        else
            taken = take_line(it, bytes, length);
        if (taken < 0) return false;
        bytes += taken;
        length -= (size_t)taken;
        if (it->state == WAITING) return length == 0; /* nobody answers before being asked */
    }
    return true;
}

/* ---- the loop ---- */

static void on_ready(struct connection *it, uint32_t ready, char *buffer) {
    if (it->state == WAITING) { /* closed by the target between two requests */
        disconnect(it);
        return;
    }
    if (ready & EPOLLOUT) {
        int problem = 0;
        socklen_t size = sizeof problem;
        getsockopt(it->descriptor, SOL_SOCKET, SO_ERROR, &problem, &size);
        if (problem != 0) {
            note_failure(it, CONNECT);
            return;
        }
        if (!send_request(it)) watch(poll_descriptor, EPOLL_CTL_MOD, it->descriptor, EPOLLIN);
    }
    if ((ready & (EPOLLIN | EPOLLHUP | EPOLLERR)) == 0) return;
    ssize_t got = recv(it->descriptor, buffer, READ_BYTES, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        note_failure(it, CLOSED);
    } else if (!take_answer(it, buffer, (size_t)got)) {
        note_failure(it, MALFORMED);
    } else if (it->state == WAITING) {
        finish(it);
    }
}

static int compare(const void *one, const void *other) {
    float left = *(const float *)one, right = *(const float *)other;
    return (left > right) - (left < right);
}

static double percentile_ms(double share) {
    if (sample_count == 0) return 0;
    size_t at = (size_t)(share * (double)sample_count);
    return (double)first_byte_seconds[at < sample_count ? at : sample_count - 1] * 1000;
}

static void report(void) {
    qsort(first_byte_seconds, sample_count, sizeof *first_byte_seconds, compare);
    double seconds = (double)(ends - measured_from) / NANOSECONDS_PER_SECOND;
    printf(
        "{\"answers\":%lld,\"measured_answers\":%lld,\"measured_seconds\":%.6f,\"answers_per_second\":%.1f,"
        "\"events\":%lld,\"first_byte_ms\":{\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"max\":%.4f},"
        "\"last_bad_status\":%d,\"failures\":{",
        (long long)answers, (long long)measured_answers, seconds, (double)measured_answers / seconds,
        (long long)events_total, percentile_ms(0.5), percentile_ms(0.9), percentile_ms(0.99),
        percentile_ms(1), last_bad_status
    );
    for (int kind = STATUS; kind < FAILURE_KINDS; kind++)
        printf("%s\"%s\":%lld", kind == STATUS ? "" : ",", failure_names[kind], (long long)failures[kind]);
    printf("}}\n");
}

static void start_due(void) {
    while (waiting_count > 0) {
        struct connection *it = &connections[waiting[waiting_first]];
        if (it->start_at > now_nanoseconds()) return;
        waiting_first = (waiting_first + 1) % connection_count;
        waiting_count--;
        begin_request(it);
    }
}

static void run(void) {
    char *buffer = allocate(READ_BYTES);
    struct epoll_event events[BATCH];
    int64_t patience = ends + (int64_t)(patience_option * NANOSECONDS_PER_SECOND);
    for (;;) {
        start_due();
        int busy = 0;
        int64_t now = now_nanoseconds();
        if (now >= ends) {
            for (int at = 0; at < connection_count; at++) busy += connections[at].state != WAITING;
            if (busy == 0) return;
            if (now >= patience) {
                failures[UNANSWERED] += busy;
                return;
            }
        }
        int ready = epoll_wait(poll_descriptor, events, BATCH, waiting_count > 0 ? 1 : 100);
        for (int at = 0; at < ready; at++) {
            struct connection *it = &connections[connection_of[events[at].data.fd]];
            if (it->descriptor == events[at].data.fd) on_ready(it, events[at].events, buffer);
        }
    }
}

int main(int words_count, char **words) {
    const struct option_spec known[] = {
        {"--port", NULL, &port_option},
        {"--connections", NULL, &connections_option},
        {"--seconds", NULL, &seconds_option},
        {"--warmup-seconds", NULL, &warmup_option},
        {"--stream", NULL, &stream_option},
        {"--events", NULL, &events_option},
        {"--expect-bytes", NULL, &expect_option},
        {"--prompts", NULL, &prompts_option},
        {"--groups", NULL, &groups_option},
        {"--prompt-bytes", NULL, &prompt_bytes_option},
        {"--ramp-ms", NULL, &ramp_option},
        {"--rate", NULL, &rate_option},
        {"--patience-seconds", NULL, &patience_option},
        {"--model", &model, NULL},
        {"--key", &key, NULL},
        {NULL, NULL, NULL}
    };
    read_options(words_count, words, known);
    connection_count = (int)connections_option;
    if (connection_count < 1 || connection_count > CONNECTIONS_MAX)
        fail("--connections", "between 1 and 20000");
    if (prompts_option < 1) fail("--prompts", "at least 1");
    raise_descriptor_limit();
    prepare_template();
    poll_descriptor = epoll_create1(EPOLL_CLOEXEC);
    connections = allocate((size_t)connection_count * sizeof *connections);
    waiting = allocate((size_t)connection_count * sizeof *waiting);
    connection_of = allocate(((size_t)CONNECTIONS_MAX * 2 + 64) * sizeof *connection_of);
    began = now_nanoseconds();
    measured_from = began + (int64_t)(warmup_option * NANOSECONDS_PER_SECOND);
    ends = measured_from + (int64_t)(seconds_option * NANOSECONDS_PER_SECOND);
    for (int at = 0; at < connection_count; at++) {
        connections[at].descriptor = -1;
        connections[at].request = allocate(request_length);
        memcpy(connections[at].request, template_text, request_length);
        wait_until(
            &connections[at],
            began + (int64_t)(ramp_option * NANOSECONDS_PER_MILLISECOND * at / connection_count)
        );
    }
    run();
    report();
    return 0;
}
