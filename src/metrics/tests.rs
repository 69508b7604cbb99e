//! Clients of every kind, by plain sockets.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Unit;

use super::*;

const ANY: &str = "127.0.0.1:0";

#[derive(Default)]
struct Thing(AtomicBool);

impl Health for Thing {
    fn health(&self) -> Result<String, String> {
        Ok("ok".into())
    }

    fn readiness(&self) -> Result<String, String> {
        let is_ready = self.0.load(Ordering::Relaxed);
        is_ready.then(|| "ready".into()).ok_or("not yet".into())
    }
}

/// Counts, or fails, panics or hangs.
#[derive(Debug)]
enum Counted {
    Well,
    Fails,
    Panics,
    Hangs,
}

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        match self {
            Self::Well => {}
            Self::Fails => return Err(fmt::Error),
            Self::Panics => panic!("as the test wants it"),
            Self::Hangs => std::thread::sleep(Duration::from_secs(3600)),
        }
        let (unit, kind) = (Unit::Bytes, MetricType::Counter);
        let encoder = encoder.encode_descriptor("things", "Help", Some(&unit), kind)?;
        ConstCounter::new(7u64).encode(encoder)
    }
}

fn serve(counted: Counted) -> (Server, Arc<Thing>) {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(counted));
    let thing = Arc::new(Thing::default());
    let health: Arc<dyn Health> = thing.clone();
    let server = Server::start(ANY.parse().unwrap(), registry, health, Capabilities::NONE);
    (server.unwrap(), thing)
}

fn send(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    // The other side may have had enough before the last of it.
    let _ = stream.write_all(bytes);
    stream
}

fn rest(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    // A connection that is reset has ended, too.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

/// The status, and all of the answer.
fn ask(server: &Server, request: &str) -> (u16, String) {
    let answer = rest(send(server, request.as_bytes()));
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or(0), answer)
}

fn get(server: &Server, path: &str, headers: &str) -> (u16, String) {
    ask(
        server,
        &format!("GET {path} HTTP/1.1\r\nHost: h\r\n{headers}\r\n"),
    )
}

#[test]
fn counts_come_in_the_format_that_is_asked_for() {
    let (server, _) = serve(Counted::Well);
    let (status, text) = get(&server, "/metrics", "");
    assert_eq!(status, 200);
    assert!(text.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    assert!(text.contains("connection: close\r\n"));
    assert!(text.ends_with(
        "\r\n\r\n# HELP things_bytes_total Help\n# TYPE things_bytes_total counter\n\
         things_bytes_total 7\n"
    ));
    let accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.5, text/plain;q=0.2\r\n";
    let (status, text) = get(&server, "/metrics?x=y", accept);
    assert_eq!(status, 200);
    assert!(text.contains("content-type: application/openmetrics-text; version=1.0.0;"));
    assert!(text.ends_with(
        "# TYPE things_bytes counter\n# UNIT things_bytes bytes\nthings_bytes_total 7\n# EOF\n"
    ));
    for accept in [
        "*/*",
        "text/plain",
        "application/openmetrics-text;q=0, */*",
        "application/json",
    ] {
        assert!(!accepts_open_metrics(accept), "{accept}");
    }
}

#[test]
fn what_is_not_served_is_refused() {
    let (server, thing) = serve(Counted::Well);
    assert_eq!(get(&server, "/healthz", "").0, 200);
    let (status, text) = get(&server, "/readyz", "");
    assert!(status == 503 && text.ends_with("\r\n\r\nnot yet\n"));
    thing.0.store(true, Ordering::Relaxed);
    assert_eq!(get(&server, "/readyz", "").0, 200);
    for path in ["/", "/metrics/", "/metricsx", "//metrics", "/../etc/passwd"] {
        assert_eq!(get(&server, path, "").0, 404, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "NONSENSE"] {
        let request = format!("{method} /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n");
        let (status, text) = ask(&server, &request);
        assert!(
            status == 405 && text.contains("allow: GET, HEAD\r\n"),
            "{text}"
        );
    }
    let (status, text) = ask(&server, "HEAD /metrics HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(status == 200 && text.ends_with("\r\n\r\n"), "{text}");
    // One request a connection.
    let twice = "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n".repeat(2);
    assert_eq!(ask(&server, &twice).1.matches("HTTP/1.1 200").count(), 1);
    assert_eq!(ask(&server, "GET /healthz HTTP/1.0\r\n\r\n").0, 200);
}

#[test]
fn garbage_ends_its_connection_and_nothing_else() {
    let (server, _) = serve(Counted::Well);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(64 << 10));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(100));
    let garbage: [&[u8]; 6] = [
        b"\0\xff\x16\x03\x01garbage\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        long.as_bytes(),
        many.as_bytes(),
    ];
    for bytes in garbage {
        let answer = rest(send(&server, bytes));
        assert!(!answer.contains(" 200 "), "{answer}");
        assert_eq!(get(&server, "/healthz", "").0, 200);
    }
}

#[test]
fn who_is_slow_holds_nobody_up_for_long() {
    let (server, _) = serve(Counted::Well);
    // More than there are places, each in the middle of its request.
    let slow: Vec<_> = (0..2 * CONNECTIONS)
        .map(|_| send(&server, b"GET /metrics HTTP/1.1\r\nHost"))
        .collect();
    assert_eq!(get(&server, "/metrics", "").0, 200);
    for stream in slow {
        // Told that it took too long, or left.
        assert!(!rest(stream).contains(" 200 "));
    }
}

#[test]
fn counting_that_fails_is_told_and_counting_that_hangs_harms_nothing_else() {
    let (server, _) = serve(Counted::Fails);
    assert_eq!(get(&server, "/metrics", "").0, 500);
    let (server, _) = serve(Counted::Panics);
    for _ in 0..2 {
        assert_eq!(get(&server, "/metrics", "").0, 500);
    }
    let (server, _) = serve(Counted::Hangs);
    let waiting = send(&server, b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(get(&server, "/healthz", "").0, 200);
    drop(server);
    assert_eq!(rest(waiting), "");
}

#[test]
fn an_address_in_use_is_told() {
    let (server, thing) = serve(Counted::Well);
    let address = server.address();
    let start = || {
        Server::start(
            address,
            Registry::default(),
            thing.clone(),
            Capabilities::NONE,
        )
    };
    assert_eq!(start().unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(server);
    assert_eq!(start().unwrap().address(), address);
}
