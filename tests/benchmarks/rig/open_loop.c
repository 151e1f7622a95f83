/* An open-loop HTTP/1.1 load generator: one thread, epoll, keep-alive connections.
 *
 * Requests arrive by a schedule that is fixed before the first one is sent, whatever the server
 * does. A request whose turn comes while all connections are busy waits here, and its latency
 * counts from the scheduled moment: a server that stalls is charged for everybody who had to wait
 * (no "coordinated omission"). Every request ends with exactly one outcome.
 *
 * Statistics are the caller's: for each request a record of 32 bytes is written at the end, and on
 * demand the answers, each with the numbers of its request and body and its status. See open_loop.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_MARKERS 64
#define MAX_HEADERS 16
#define HOUSEKEEPING_MS 20
#define RECONNECT_NS 20000000LL

/* Outcomes that are no HTTP status. */
enum { PENDING = 0, REFUSED = -1, LOST = -2, TIMED_OUT = -3, UNANSWERED = -4, MALFORMED = -5 };

struct record {
    int64_t scheduled, sent, done; /* nanoseconds since the start; -1: never */
    int32_t outcome;               /* HTTP status, or one of the above */
    int32_t marker;                /* which marker the answer's body holds; -1: none */
};

enum state { CLOSED, CONNECTING, IDLE, BUSY };

struct connection {
    int fd;
    enum state state;
    size_t request;         /* index of the record it works on */
    const char *out;
    size_t out_left;
    int wants_out;
    char *in;
    size_t in_size, in_room;
    size_t head_size;       /* bytes up to the body; 0: not all there yet */
    long long body_size;    /* -1: chunked, -2: until the connection ends */
    int status, closes;
    int64_t retry_at;
    struct connection *next_idle;
};

static struct {
    const char *host, *port, *path, *content_type, *bodies, *records, *answers;
    const char *headers[MAX_HEADERS];
    const char *markers[MAX_MARKERS];
    size_t num_headers, num_markers;
    double rate, seconds, drain_seconds;
    int64_t timeout_ns;
    unsigned long num_connections, every;
    uint64_t seed;
    enum { POISSON, CONSTANT, CLOSED_LOOP } arrivals;
} given = {.path = "/v1/score", .content_type = "application/json", .drain_seconds = 5,
           .timeout_ns = 10000000000LL, .num_connections = 8, .every = 1};

static struct addrinfo *address;
static char **requests;
static size_t *request_sizes, num_requests;
static struct record *records;
static size_t num_records, room, head, num_open; /* records from `head` on wait to be sent */
static struct connection *connections, *first_idle, *last_idle;
static size_t num_alive, num_opened, num_reopened, longest_queue;
static uint64_t bytes_received;
static int64_t started;
static int poller;
static FILE *answers;
static volatile sig_atomic_t stopped;

static void die(const char *what) {
    fprintf(stderr, "open_loop: %s: %s\n", what, errno ? strerror(errno) : "cannot be used");
    exit(2);
}

static void *checked(void *memory) {
    if (!memory) die("memory");
    return memory;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* --- arrivals --------------------------------------------------------------------------- */

static double uniform(void) { /* splitmix64, in (0, 1] */
    uint64_t z = (given.seed += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return ((double)((z ^ (z >> 31)) >> 11) + 1) / 9007199254740992.0;
}

/* Moment of the next arrival, after `last` and `number` others. */
static double next_arrival(double last, size_t number) {
    if (given.arrivals == CLOSED_LOOP) return INFINITY;
    if (given.arrivals == CONSTANT) return number * 1e9 / given.rate;
    return last - log(uniform()) * 1e9 / given.rate;
}

static size_t arrive(int64_t scheduled) {
    if (num_records == room) {
        room = room ? 2 * room : 65536;
        records = checked(realloc(records, room * sizeof *records));
    }
    records[num_records] = (struct record){scheduled, -1, -1, PENDING, -1};
    num_open++;
    return num_records++;
}

static void end_request(size_t index, int outcome, int64_t when) {
    records[index].outcome = outcome;
    records[index].done = when < 0 ? -1 : when - started;
    num_open--;
}

/* --- connections ------------------------------------------------------------------------ */

static void push_idle(struct connection *c) {
    c->state = IDLE;
    c->next_idle = NULL;
    if (last_idle) last_idle->next_idle = c;
    else first_idle = c;
    last_idle = c;
}

static void drop_idle(struct connection *c) {
    struct connection **at = &first_idle, *previous = NULL;
    while (*at && *at != c) previous = *at, at = &(*at)->next_idle;
    if (!*at) return;
    *at = c->next_idle;
    if (last_idle == c) last_idle = previous;
}

static void watch(struct connection *c, int also_out) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (also_out ? EPOLLOUT : 0),
                                .data.ptr = c};
    c->wants_out = also_out;
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) die("epoll_ctl");
}

static void shut(struct connection *c, int64_t retry_at) {
    if (c->state == IDLE) drop_idle(c);
    if (c->state != CLOSED) num_alive--;
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->state = CLOSED;
    c->in_size = c->head_size = 0;
    c->retry_at = retry_at;
}

static void open_connection(struct connection *c) {
    int one = 1;
    c->fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->state = CONNECTING;
    num_alive++;
    if (connect(c->fd, address->ai_addr, address->ai_addrlen) && errno != EINPROGRESS) {
        shut(c, now_ns() + RECONNECT_NS);
        return;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    c->wants_out = 1;
}

/* The connection is gone: so is the request it worked on, if any. */
static void lose(struct connection *c, int outcome) {
    int64_t when = now_ns();
    if (c->state == BUSY) end_request(c->request, outcome, when);
    else if (c->state == IDLE) num_reopened++;
    shut(c, c->state == CONNECTING ? when + RECONNECT_NS : when);
}

static void flush(struct connection *c) {
    while (c->out_left) {
        ssize_t sent = send(c->fd, c->out, c->out_left, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                if (!c->wants_out) watch(c, 1);
                return;
            }
            lose(c, LOST);
            return;
        }
        c->out += sent;
        c->out_left -= sent;
    }
    if (c->wants_out) watch(c, 0);
}

static void dispatch(int64_t last_arrival) {
    for (;;) {
        if (given.arrivals == CLOSED_LOOP && head == num_records) {
            int64_t now = now_ns();
            if (!first_idle || now >= last_arrival || stopped) return;
            arrive(now - started);
        }
        if (head == num_records) return;
        struct connection *c = first_idle;
        if (!c) {
            if (num_alive) break;
            end_request(head++, REFUSED, now_ns()); /* nobody listens */
            continue;
        }
        drop_idle(c);
        c->state = BUSY;
        c->request = head++;
        c->in_size = c->head_size = 0;
        c->out = requests[c->request % num_requests];
        c->out_left = request_sizes[c->request % num_requests];
        records[c->request].sent = now_ns() - started;
        flush(c);
    }
    if (num_records - head > longest_queue) longest_queue = num_records - head;
}

/* --- answers ---------------------------------------------------------------------------- */

/* Size of a complete chunked body, decoded in place; -1: not complete, -2: not a chunked body. */
static long long join_chunks(char *body, size_t size) {
    size_t from = 0, to = 0;
    for (int moves = 0; moves < 2; moves++) { /* first look, then move */
        for (from = to = 0;;) {
            char *line = memmem(body + from, size - from, "\r\n", 2), *end;
            if (!line) return -1;
            unsigned long chunk = strtoul(body + from, &end, 16);
            if (end == body + from) return -2;
            from = line + 2 - body;
            if (size - from < 2 || size - from - 2 < chunk) return -1;
            if (memcmp(body + from + chunk, "\r\n", 2)) return -2; /* trailers are not known here */
            if (moves) memmove(body + to, body + from, chunk);
            to += chunk;
            from += chunk + 2;
            if (!chunk) break;
        }
        if (from != size) return -2;
    }
    return to;
}

static int read_head(struct connection *c) {
    char *end = memmem(c->in, c->in_size, "\r\n\r\n", 4);
    if (!end) return c->in_size > 65536 ? -1 : 0;
    if (c->in_size < 12 || memcmp(c->in, "HTTP/1.", 7)) return -1;
    c->status = atoi(c->in + 9);
    if (c->status < 200 || c->status > 599) return -1;
    c->head_size = end + 4 - c->in;
    c->body_size = c->status == 204 || c->status == 304 ? 0 : -2;
    c->closes = c->in[7] == '0';
    for (char *line = memmem(c->in, c->in_size, "\r\n", 2) + 2; line < end + 2;) {
        char *next = memmem(line, end + 2 - line, "\r\n", 2);
        if (!strncasecmp(line, "content-length:", 15)) c->body_size = atoll(line + 15);
        else if (!strncasecmp(line, "transfer-encoding:", 18)) c->body_size = -1;
        else if (!strncasecmp(line, "connection:", 11))
            c->closes = memmem(line, next - line, "close", 5) != NULL;
        line = next + 2;
    }
    return 1;
}

static void answered(struct connection *c, char *body, size_t size) {
    size_t index = c->request;
    int64_t when = now_ns();
    for (size_t i = 0; i < given.num_markers && records[index].marker < 0; i++)
        if (memmem(body, size, given.markers[i], strlen(given.markers[i])))
            records[index].marker = i;
    if (answers && index % given.every == 0) {
        uint32_t facts[4] = {index, index % num_requests, c->status, size};
        fwrite(facts, sizeof facts, 1, answers);
        fwrite(body, 1, size, answers);
    }
    end_request(index, c->status, when);
    if (c->closes) {
        c->state = IDLE; /* it is nobody's loss */
        c->next_idle = NULL;
        num_reopened++;
        shut(c, when);
    } else {
        push_idle(c);
    }
}

/* Look at what has come; an answer that is not complete waits for more. */
static void parse(struct connection *c, int ended) {
    if (!c->head_size) {
        int found = read_head(c);
        if (found < 0) {
            lose(c, MALFORMED);
            return;
        }
        if (!found) {
            if (ended) lose(c, LOST);
            return;
        }
    }
    char *body = c->in + c->head_size;
    size_t have = c->in_size - c->head_size;
    long long size = c->body_size;
    if (size == -1) size = join_chunks(body, have);
    else if (size == -2) size = ended ? (long long)have : -1;
    else if (have > (size_t)size) size = -2; /* more than was announced */
    else if (have < (size_t)size) size = -1;
    if (size >= 0) {
        if (ended) c->closes = 1;
        answered(c, body, size);
    } else if (size == -2) {
        lose(c, MALFORMED);
    } else if (ended) {
        lose(c, LOST);
    }
}

static void receive(struct connection *c) {
    for (;;) {
        if (c->in_room - c->in_size < 16384) {
            c->in_room = c->in_room ? 2 * c->in_room : 65536;
            c->in = checked(realloc(c->in, c->in_room + 1));
        }
        ssize_t got = recv(c->fd, c->in + c->in_size, c->in_room - c->in_size, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (got <= 0) {
            if (c->state == BUSY && got == 0) parse(c, 1);
            else lose(c, LOST);
            return;
        }
        bytes_received += got;
        c->in_size += got;
        c->in[c->in_size] = 0;
        if (c->state != BUSY) { /* an answer that nobody asked for */
            lose(c, MALFORMED);
            return;
        }
        parse(c, 0);
        if (c->state != BUSY || c->in_size < c->in_room) return;
    }
}

static void wake(struct connection *c, uint32_t events) {
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error || events & (EPOLLERR | EPOLLHUP)) {
            lose(c, REFUSED);
        } else if (events & EPOLLOUT) {
            num_opened++;
            watch(c, 0);
            push_idle(c);
        }
        return;
    }
    if (c->state == BUSY && events & EPOLLOUT) flush(c);
    if (c->state != CLOSED && events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP)) receive(c);
    if (c->state == IDLE && events & EPOLLRDHUP) lose(c, LOST); /* idle: nothing is lost */
}

static void housekeep(int64_t now) {
    for (size_t i = 0; i < given.num_connections; i++) {
        struct connection *c = &connections[i];
        if (c->state == BUSY && now - started - records[c->request].sent > given.timeout_ns)
            lose(c, TIMED_OUT);
        if (c->state == CLOSED && now >= c->retry_at) open_connection(c);
    }
    while (head < num_records && now - started - records[head].scheduled > given.timeout_ns)
        end_request(head++, TIMED_OUT, now);
}

/* --- inputs and outputs ----------------------------------------------------------------- */

static void read_bodies(void) {
    FILE *file = fopen(given.bodies, "rb");
    uint32_t size;
    if (!file) die(given.bodies);
    while (fread(&size, sizeof size, 1, file) == 1) {
        char *start = NULL;
        size_t head_size;
        FILE *text = open_memstream(&start, &head_size);
        fprintf(text, "POST %s HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: %s\r\n", given.path,
                given.host, given.port, given.content_type);
        for (size_t i = 0; i < given.num_headers; i++)
            fprintf(text, "%s\r\n", given.headers[i]);
        fprintf(text, "Content-Length: %u\r\n\r\n", size);
        fclose(text);
        requests = checked(realloc(requests, (num_requests + 1) * sizeof *requests));
        request_sizes = checked(realloc(request_sizes, (num_requests + 1) * sizeof(size_t)));
        start = checked(realloc(start, head_size + size + 1));
        if (fread(start + head_size, 1, size, file) != size) die(given.bodies);
        requests[num_requests] = start;
        request_sizes[num_requests++] = head_size + size;
    }
    fclose(file);
    errno = 0;
    if (!num_requests) die(given.bodies);
}

static void read_arguments(int argc, char **argv) {
    enum { HOST = 1, PORT, PATH, TYPE, HEADER, BODIES, RECORDS, ANSWERS, EVERY, MARKER, RATE,
           SECONDS, DRAIN, TIMEOUT, CONNECTIONS, SEED, ARRIVALS };
    static const struct option options[] = {
        {"host", 1, 0, HOST}, {"port", 1, 0, PORT}, {"path", 1, 0, PATH},
        {"content-type", 1, 0, TYPE}, {"header", 1, 0, HEADER}, {"bodies", 1, 0, BODIES},
        {"records", 1, 0, RECORDS}, {"answers", 1, 0, ANSWERS}, {"every", 1, 0, EVERY},
        {"marker", 1, 0, MARKER}, {"rate", 1, 0, RATE}, {"seconds", 1, 0, SECONDS},
        {"drain-seconds", 1, 0, DRAIN}, {"timeout-ms", 1, 0, TIMEOUT},
        {"connections", 1, 0, CONNECTIONS}, {"seed", 1, 0, SEED}, {"arrivals", 1, 0, ARRIVALS},
        {0, 0, 0, 0}};
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case HOST: given.host = optarg; break;
        case PORT: given.port = optarg; break;
        case PATH: given.path = optarg; break;
        case TYPE: given.content_type = optarg; break;
        case HEADER: if (given.num_headers == MAX_HEADERS) die("--header");
                     given.headers[given.num_headers++] = optarg; break;
        case BODIES: given.bodies = optarg; break;
        case RECORDS: given.records = optarg; break;
        case ANSWERS: given.answers = optarg; break;
        case EVERY: given.every = strtoul(optarg, NULL, 10); break;
        case MARKER: if (given.num_markers == MAX_MARKERS) die("--marker");
                     given.markers[given.num_markers++] = optarg; break;
        case RATE: given.rate = atof(optarg); break;
        case SECONDS: given.seconds = atof(optarg); break;
        case DRAIN: given.drain_seconds = atof(optarg); break;
        case TIMEOUT: given.timeout_ns = (int64_t)(atof(optarg) * 1e6); break;
        case CONNECTIONS: given.num_connections = strtoul(optarg, NULL, 10); break;
        case SEED: given.seed = strtoull(optarg, NULL, 10); break;
        case ARRIVALS: given.arrivals = !strcmp(optarg, "constant") ? CONSTANT
                                        : !strcmp(optarg, "closed") ? CLOSED_LOOP : POISSON; break;
        default: exit(2);
        }
    }
    if (!given.host || !given.port || !given.bodies || !given.records || given.seconds <= 0 ||
        !given.num_connections || !given.every ||
        (given.arrivals != CLOSED_LOOP && given.rate <= 0)) {
        fprintf(stderr, "open_loop: --host, --port, --bodies, --records, --rate and --seconds "
                        "are needed\n");
        exit(2);
    }
}

static double seconds_of(struct timeval t) { return t.tv_sec + t.tv_usec / 1e6; }

static void report(int64_t ended, int64_t last_arrival, int64_t wall_start) {
    struct rusage use;
    FILE *file = fopen(given.records, "wb");
    if (!file || fwrite(records, sizeof *records, num_records, file) != num_records || fclose(file))
        die(given.records);
    if (answers && fclose(answers)) die(given.answers);
    getrusage(RUSAGE_SELF, &use);
    printf("{\"started_ns\": %lld, \"started_wall_ns\": %lld, \"scheduled_seconds\": %.9f, "
           "\"seconds\": %.9f, \"num_requests\": %zu, \"cpu_user_seconds\": %.6f, "
           "\"cpu_system_seconds\": %.6f, \"num_opened\": %zu, \"num_reopened\": %zu, "
           "\"longest_queue\": %zu, \"bytes_received\": %llu}\n",
           (long long)started, (long long)wall_start, (last_arrival - started) / 1e9,
           (ended - started) / 1e9, num_records, seconds_of(use.ru_utime), seconds_of(use.ru_stime),
           num_opened, num_reopened, longest_queue, (unsigned long long)bytes_received);
}

/* epoll_wait to the nanosecond; kernels before 5.11 wait whole milliseconds and spin the rest. */
static int wait_events(struct epoll_event *events, int size, int64_t ns) {
    static int coarse;
#ifdef SYS_epoll_pwait2
    if (!coarse) {
        struct timespec t = {ns / 1000000000LL, ns % 1000000000LL};
        int found = syscall(SYS_epoll_pwait2, poller, events, size, &t, NULL, 0);
        if (found >= 0 || errno != ENOSYS) return found;
        coarse = 1;
    }
#endif
    return epoll_wait(poller, events, size, ns / 1000000);
}

static void stop(int signal) {
    (void)signal;
    stopped = 1;
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    read_bodies();
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (getaddrinfo(given.host, given.port, &hints, &address)) errno = 0, die(given.host);
    if (given.answers && !(answers = fopen(given.answers, "wb"))) die(given.answers);
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    struct epoll_event events[256];
    prctl(PR_SET_TIMERSLACK, 1000UL);
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);

    connections = checked(calloc(given.num_connections, sizeof *connections));
    for (size_t i = 0; i < given.num_connections; i++) {
        connections[i].fd = -1;
        open_connection(&connections[i]);
    }
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    started = now_ns();
    int64_t next_look = started, now = started;
    int64_t last_arrival = started + (int64_t)(given.seconds * 1e9), give_up = INT64_MAX;
    double arrival = next_arrival(0, 0);

    for (;;) {
        now = now_ns();
        if (stopped && last_arrival > now) last_arrival = now;
        while (arrival < last_arrival - started && arrival <= now - started) {
            arrive((int64_t)arrival);
            arrival = next_arrival(arrival, num_records);
        }
        if (now >= next_look) {
            housekeep(now);
            next_look = now + HOUSEKEEPING_MS * 1000000LL;
        }
        dispatch(last_arrival);
        int over = given.arrivals == CLOSED_LOOP ? now >= last_arrival
                                                 : arrival >= last_arrival - started;
        if (over && give_up == INT64_MAX)
            give_up = (last_arrival > now ? last_arrival : now) +
                      (int64_t)(given.drain_seconds * 1e9);
        if (over && now >= last_arrival && (!num_open || now >= give_up)) break;
        int64_t pause = HOUSEKEEPING_MS * 1000000LL;
        if (!over && started + arrival < now_ns() + pause) pause = started + arrival - now_ns();
        int found = wait_events(events, 256, pause > 0 ? pause : 0);
        for (int i = 0; i < found; i++) wake(events[i].data.ptr, events[i].events);
    }
    for (size_t i = 0; i < num_records; i++)
        if (records[i].outcome == PENDING) end_request(i, UNANSWERED, -1);
    report(now, last_arrival, wall.tv_sec * 1000000000LL + wall.tv_nsec);
    return 0;
}
