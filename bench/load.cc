// Drives a gRPC server with ready-made requests: one thread, each line of calls in ping-pong.
//
//   load HOST:PORT METHOD unary|stream REQUESTS WARM_UP_S RUN_S [CA.pem]
//
// REQUESTS holds one record for each line: a little-endian u32 length and that many bytes, sent again
// and again as soon as the last reply has come. "unary" makes a call of each, "stream" writes them to a
// stream that the line has for itself. A connection carries at most 256 lines, since servers limit its
// streams, and all carry about as many. With CA.pem it speaks TLS; with a token in STEPWELL_TOKEN its
// calls show that. With LOAD_RATE a fixed number of calls is sent per second, by all lines together: a
// line whose reply is late catches up.
// Prints one JSON document. Loopback only, bounded in time.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <queue>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kLinesOfConnection = 256;

double seconds_since(Clock::time_point then) {
  return std::chrono::duration<double>(Clock::now() - then).count();
}

double processor_s() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

struct Line;

struct Run {
  grpc::CompletionQueue queue;
  std::string method;
  std::string authorization;  // of its calls; empty: none
  bool counting = false, stopping = false;
  bool has_parts = false;  // an answer on a stream may come in several messages
  double every_s = 0;  // between two calls of a line; 0: each follows the reply to the last
  std::priority_queue<std::pair<Clock::time_point, Line*>, std::vector<std::pair<Clock::time_point, Line*>>,
                      std::greater<>>
      waiting;  // lines, by the time of their next call
  int in_flight = 0;
  long errors = 0;
  std::string first_error;
  std::vector<float> latencies_us;

  void fail(const std::string& what) {
    ++errors;
    if (first_error.empty()) first_error = what;
  }
};

// Whether a StepStreamResponse says that no part of its frame follows: field 9.
bool is_last(const grpc::ByteBuffer& reply) {
  std::vector<grpc::Slice> slices;
  if (!reply.Dump(&slices).ok()) return true;
  std::string bytes;
  for (const auto& slice : slices) bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  size_t at = 0;
  auto number = [&] {
    uint64_t value = 0;
    for (int shift = 0; at < bytes.size(); shift += 7) {
      const auto byte = static_cast<unsigned char>(bytes[at++]);
      value |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) break;
    }
    return value;
  };
  while (at < bytes.size()) {
    const uint64_t tag = number(), value = number();
    if (tag == (9 << 3)) return value != 0;
    if ((tag & 7) == 2) at += value;
  }
  return false;
}

// One line of calls. An event belongs to the line and says which of its operations is done.
struct Line {
  enum Kind { kStarted, kWritten, kRead, kFinished };
  struct Event {
    Line* line;
    Kind kind;
  };

  Run& run;
  grpc::GenericStub& stub;
  const bool streams;
  grpc::ByteBuffer request, reply;
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> call;
  grpc::Status status;
  Clock::time_point sent, due;  // due: of the next call, if calls have a rate
  bool wrote = false, read = false, over = false;
  Event started{this, kStarted}, written{this, kWritten}, got{this, kRead}, finished{this, kFinished};

  Line(Run& run, grpc::GenericStub& stub, bool streams, const std::string& body)
      : run(run), stub(stub), streams(streams) {
    grpc::Slice slice(body);
    request = grpc::ByteBuffer(&slice, 1);
  }

  void make_context() {
    context = std::make_unique<grpc::ClientContext>();
    if (!run.authorization.empty()) context->AddMetadata("authorization", run.authorization);
  }

  void next() {
    if (run.every_s == 0) return send();
    run.waiting.emplace(due, this);
    due += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(run.every_s));
  }

  void open() {
    if (!streams) return next();
    make_context();
    stream = stub.PrepareCall(context.get(), run.method, &run.queue);
    ++run.in_flight;
    stream->StartCall(&started);
  }

  void send() {
    sent = Clock::now();
    ++run.in_flight;
    if (streams) {
      wrote = read = false;
      ++run.in_flight;
      stream->Write(request, &written);
      stream->Read(&reply, &got);
    } else {
      make_context();
      call = stub.PrepareUnaryCall(context.get(), run.method, request, &run.queue);
      call->StartCall();
      call->Finish(&reply, &status, &finished);
    }
  }

  void answered() {
    if (run.counting) run.latencies_us.push_back(static_cast<float>(seconds_since(sent) * 1e6));
    if (!run.stopping) next();
  }

  void finish_stream(const char* why) {
    if (over) return;
    over = true;
    if (!run.stopping) run.fail(why);
    ++run.in_flight;
    context->TryCancel();
    stream->Finish(&status, &finished);
  }

  void on(Kind kind, bool ok) {
    --run.in_flight;
    if (kind == kFinished) {
      if (streams) return;
      if (!status.ok()) {
        run.fail(status.error_message());
        if (run.errors > 1000) run.stopping = true;
        if (!run.stopping) next();
        return;
      }
      return answered();
    }
    if (!ok) return finish_stream("a stream ended");
    if (kind == kStarted) return next();
    if (kind == kRead && run.has_parts && !is_last(reply)) {
      ++run.in_flight;
      return stream->Read(&reply, &got);
    }
    (kind == kWritten ? wrote : read) = true;
    if (wrote && read) answered();
  }

  void close() {
    if (streams && stream && !over) finish_stream("");
  }
};

double quantile(const std::vector<float>& sorted, double q) {
  return sorted.empty() ? 0.0 : sorted[std::min(sorted.size() - 1, static_cast<size_t>(q * sorted.size()))];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7 && argc != 8) {
    std::fprintf(stderr, "usage: load HOST:PORT METHOD unary|stream REQUESTS WARM_UP_S RUN_S [CA.pem]\n");
    return 2;
  }
  const std::string address = argv[1];
  const bool streams = std::string(argv[3]) == "stream";
  const double warm_up_s = std::atof(argv[5]), run_s = std::atof(argv[6]);
  if (address.rfind("127.0.0.1:", 0) != 0 || warm_up_s > 60 || run_s > 60) {
    std::fprintf(stderr, "only on 127.0.0.1, and for a minute at most\n");
    return 2;
  }
  Run run;
  run.method = argv[2];
  run.has_parts = streams && run.method == "/stepwell.v1.SessionService/StepStream";
  if (const char* token = std::getenv("STEPWELL_TOKEN")) run.authorization = std::string("Bearer ") + token;
  run.latencies_us.reserve(4000000);
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // else channels share their connection
  auto credentials = grpc::InsecureChannelCredentials();
  if (argc == 8) {
    std::ifstream ca(argv[7]);
    grpc::SslCredentialsOptions options;
    options.pem_root_certs.assign(std::istreambuf_iterator<char>(ca), {});
    credentials = grpc::SslCredentials(options);
  }
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  std::vector<std::unique_ptr<Line>> lines;
  std::ifstream file(argv[4], std::ios::binary);
  std::vector<std::string> bodies;
  for (uint32_t size; file.read(reinterpret_cast<char*>(&size), 4);) {
    bodies.emplace_back(size, '\0');
    file.read(&bodies.back()[0], size);
  }
  const size_t connections = (bodies.size() + kLinesOfConnection - 1) / kLinesOfConnection;
  for (const auto& body : bodies) {
    if (stubs.size() < connections) {
      auto channel = grpc::CreateCustomChannel(address, credentials, arguments);
      if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20))) {
        std::fprintf(stderr, "no server\n");
        return 3;
      }
      stubs.push_back(std::make_unique<grpc::GenericStub>(channel));
    }
    lines.push_back(std::make_unique<Line>(run, *stubs[lines.size() % connections], streams, body));
  }
  if (lines.empty()) {
    std::fprintf(stderr, "no requests\n");
    return 3;
  }
  auto began = Clock::now();
  if (const char* rate = std::getenv("LOAD_RATE")) run.every_s = lines.size() / std::atof(rate);
  for (size_t place = 0; place < lines.size(); ++place) {
    const std::chrono::duration<double> offset(run.every_s * place / lines.size());
    lines[place]->due = began + std::chrono::duration_cast<Clock::duration>(offset);
    lines[place]->open();
  }

  double measured_s = 0, processor_before = 0, processor_used = 0;
  auto last = Clock::now();
  while (run.in_flight > 0 || !(run.stopping || run.waiting.empty())) {
    void* tag;
    bool ok;
    Clock::duration patience = std::chrono::seconds(1);
    for (; !run.waiting.empty() && !run.stopping; run.waiting.pop()) {
      const auto [due, line] = run.waiting.top();
      if (due > Clock::now()) {
        patience = std::min(patience, due - Clock::now());
        break;
      }
      line->send();
    }
    const auto until = std::chrono::system_clock::now() + patience;
    const auto next = run.queue.AsyncNext(&tag, &ok, until);
    if (next == grpc::CompletionQueue::GOT_EVENT) {
      auto* event = static_cast<Line::Event*>(tag);
      event->line->on(event->kind, ok);
      last = Clock::now();
    } else if (seconds_since(last) > 30) {
      run.fail("no reply for 30 s");
      break;
    }
    const double passed = seconds_since(began);
    if (!run.counting && !run.stopping && passed >= warm_up_s) {
      run.counting = true;
      began = Clock::now();
      processor_before = processor_s();
    } else if (run.counting && (passed >= run_s || run.stopping)) {
      run.counting = false;
      run.stopping = true;
      measured_s = passed;
      processor_used = processor_s() - processor_before;
      for (auto& line : lines) line->close();
    }
  }
  auto& us = run.latencies_us;
  std::sort(us.begin(), us.end());
  for (char& c : run.first_error)
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32) c = ' ';
  std::printf(
      "{\"calls\": %zu, \"seconds\": %.4f, \"rate\": %.1f, \"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f, "
      "\"errors\": %ld, \"first_error\": \"%s\", \"client_cpu_s\": %.3f}\n",
      us.size(), measured_s, measured_s > 0 ? us.size() / measured_s : 0.0, quantile(us, 0.5) / 1e3,
      quantile(us, 0.9) / 1e3, quantile(us, 0.99) / 1e3, run.errors, run.first_error.c_str(), processor_used);
  std::fflush(stdout);
  _exit(0);
}
