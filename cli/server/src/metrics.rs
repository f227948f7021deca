//! What the server counts, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nido_api::state::VmState;
use nido_api::{DeliveryCounts, StartPath, VmInfo};

/// Upper ends of the buckets for times, in seconds.
const BUCKETS: [f64; 10] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The methods that are counted apart.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];

/// Counters since the server began.
#[derive(Debug, Default)]
pub struct Metrics {
    connections: AtomicU64,
    execs: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// By method, route and status.
    requests: Mutex<BTreeMap<(&'static str, String, u16), u64>>,
    /// By code.
    errors: Mutex<BTreeMap<&'static str, u64>>,
    /// By path.
    spawns: Mutex<BTreeMap<&'static str, Histogram>>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Metrics {
    /// A connection was accepted.
    pub fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was answered. The route is one of ours; a method that HTTP does not define counts as `other`, so that clients
    /// cannot make labels.
    pub fn request(&self, method: &str, route: &str, status: u16) {
        let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("other");
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((method, route.to_owned(), status)).or_default() += 1;
    }

    /// It was answered with an error.
    pub fn error(&self, code: &'static str) {
        *self.errors.lock().unwrap_or_else(PoisonError::into_inner).entry(code).or_default() += 1;
    }

    /// A command was run.
    pub fn exec(&self) {
        self.execs.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes went into a guest.
    pub fn bytes_in(&self, bytes: u64) {
        self.bytes_in.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes came out of one.
    pub fn bytes_out(&self, bytes: u64) {
        self.bytes_out.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A VM is ready.
    pub fn spawn(&self, vm: &VmInfo) {
        let Some(timings) = &vm.timings else { return };
        let path = match timings.path {
            StartPath::Cold => "cold",
            StartPath::Fork => "fork",
            StartPath::Pool => "pool",
            StartPath::Restore => "restore",
        };
        let took = Duration::from_secs_f64((timings.total_ms / 1000.0).clamp(0.0, 1e6)).as_secs_f64();
        let mut spawns = self.spawns.lock().unwrap_or_else(PoisonError::into_inner);
        let times = spawns.entry(path).or_default();
        times.count += 1;
        times.sum += took;
        for (bucket, end) in times.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(took <= end);
        }
    }

    /// Everything, as text; with what the store counts: VMs, and each endpoint's deliveries.
    pub fn render(&self, vms: &[VmInfo], deliveries: &[DeliveryCounts]) -> String {
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        head(&mut text, "nido_vms", "gauge", "VMs by state.");
        for state in VmState::SHOWN {
            let count = vms.iter().filter(|vm| vm.status == state).count();
            let _ = writeln!(text, "nido_vms{{state=\"{}\"}} {count}", state.word());
        }
        head(&mut text, "nido_webhook_deliveries", "gauge", "Deliveries in the store by endpoint and state.");
        for DeliveryCounts { webhook_id: webhook, by_state } in deliveries {
            for (state, count) in by_state {
                let labels = format!("webhook=\"{webhook}\",state=\"{}\"", state.word());
                let _ = writeln!(text, "nido_webhook_deliveries{{{labels}}} {count}");
            }
        }
        let plain = [
            ("nido_http_connections_total", "Connections accepted.", &self.connections),
            ("nido_execs_total", "Commands run.", &self.execs),
            ("nido_guest_bytes_in_total", "Bytes sent into guests.", &self.bytes_in),
            ("nido_guest_bytes_out_total", "Bytes received from guests.", &self.bytes_out),
        ];
        for (name, help, counter) in plain {
            head(&mut text, name, "counter", help);
            let _ = writeln!(text, "{name} {}", counter.load(Ordering::Relaxed));
        }
        head(&mut text, "nido_http_requests_total", "counter", "Requests by method, route and status.");
        for ((method, route, status), count) in &*self.requests.lock().unwrap_or_else(PoisonError::into_inner) {
            let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
            let _ = writeln!(text, "nido_http_requests_total{{{labels}}} {count}");
        }
        head(&mut text, "nido_errors_total", "counter", "Requests that failed, by code.");
        for (code, count) in &*self.errors.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = writeln!(text, "nido_errors_total{{code=\"{code}\"}} {count}");
        }
        head(&mut text, "nido_spawn_seconds", "histogram", "Time until a VM was ready, by start path.");
        for (path, times) in &*self.spawns.lock().unwrap_or_else(PoisonError::into_inner) {
            for (count, end) in times.buckets.iter().zip(BUCKETS) {
                let _ = writeln!(text, "nido_spawn_seconds_bucket{{path=\"{path}\",le=\"{end}\"}} {count}");
            }
            let _ = writeln!(text, "nido_spawn_seconds_bucket{{path=\"{path}\",le=\"+Inf\"}} {}", times.count);
            let _ = writeln!(text, "nido_spawn_seconds_sum{{path=\"{path}\"}} {}", times.sum);
            let _ = writeln!(text, "nido_spawn_seconds_count{{path=\"{path}\"}} {}", times.count);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Any client created a label, and so an entry, of up to 32 KiB with every request.
    #[test]
    fn clients_make_no_labels() {
        let metrics = Metrics::default();
        for number in 0..100 {
            metrics.request(&format!("METHOD{number}"), "-", 405);
        }
        metrics.request("GET", "/v1/vms", 200);
        assert_eq!(metrics.requests.lock().unwrap().len(), 2);
        let text = metrics.render(&[], &[]);
        assert!(text.contains("nido_http_requests_total{method=\"other\",route=\"-\",status=\"405\"} 100"), "{text}");
    }
}
