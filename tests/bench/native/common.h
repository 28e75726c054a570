/* Shared by the canned engine and the load client: options, time, sockets, heads of HTTP messages.
 *
 * Everything here is static and small, so that each program stays one file that one compiler call builds.
 * Must not: allocate without a bound, or hide an error: what cannot go on ends the program with a line of
 * text.
 */
#ifndef MILLRACE_BENCH_COMMON_H
#define MILLRACE_BENCH_COMMON_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS_PER_SECOND 1000000000LL
#define NANOSECONDS_PER_MILLISECOND 1000000LL

__attribute__((noreturn, unused)) static void fail(const char *what, const char *detail) {
    fprintf(stderr, "error: %s: %s\n", what, detail);
    exit(2);
}

static inline int64_t now_nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * NANOSECONDS_PER_SECOND + time.tv_nsec;
}

__attribute__((unused)) static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL) fail("memory", "out of it");
    return memory;
}

/* Options are pairs, `--name value`; the caller names the ones it knows. */
struct option_spec {
    const char *name;
    const char **text;
    double *number;
};

__attribute__((unused)) static void read_options(int count, char **words, const struct option_spec *known) {
    for (int at = 1; at < count; at += 2) {
        const struct option_spec *option = known;
        while (option->name != NULL && strcmp(option->name, words[at]) != 0) option++;
        if (option->name == NULL) fail("unknown option", words[at]);
        if (at + 1 >= count) fail("option without a value", words[at]);
        if (option->text != NULL) {
            *option->text = words[at + 1];
            continue;
        }
        char *end;
        *option->number = strtod(words[at + 1], &end);
        if (*end != '\0' || end == words[at + 1]) fail("not a number", words[at + 1]);
    }
}

/* Thousands of connections need as many descriptors; the hard limit is the most that can be had. */
__attribute__((unused)) static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static inline void make_prompt(int descriptor) {
    int one = 1;
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static inline void watch(int poll, int operation, int descriptor, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = descriptor};
    if (epoll_ctl(poll, operation, descriptor, &event) != 0) fail("epoll_ctl", strerror(errno));
}

/* The length of a message's head including its blank line, or 0 while it is not complete. */
static inline size_t head_length(const char *text, size_t length) {
    const char *end = memmem(text, length, "\r\n\r\n", 4);
    return end == NULL ? 0 : (size_t)(end - text) + 4;
}

/* The value of a header field within a head, or NULL. `name` is in lower case without the colon. */
static inline const char *header_value(const char *head, size_t length, const char *name) {
    size_t name_length = strlen(name);
    const char *end = head + length;
    for (const char *line = memchr(head, '\n', length); line != NULL && line + 1 < end;
         line = memchr(line + 1, '\n', (size_t)(end - line - 1))) {
        const char *field = line + 1;
        if ((size_t)(end - field) <= name_length || field[name_length] != ':') continue;
        if (strncasecmp(field, name, name_length) != 0) continue;
        field += name_length + 1;
        while (field < end && (*field == ' ' || *field == '\t')) field++;
        return field;
    }
    return NULL;
}

#endif
