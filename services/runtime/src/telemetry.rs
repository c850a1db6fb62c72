//! Logs on stderr, and traces and metrics over OTLP where an endpoint is configured.
//!
//! Logs are JSON when stderr is not a terminal, unless `MILLSTREAM_LOG_FORMAT` says `text`; `RUST_LOG` selects levels.
//! Both are off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `…_METRICS_ENDPOINT`) is
//! set; the standard `OTEL_*` variables apply. Trace context crosses processes as a W3C `traceparent`.

use std::io::IsTerminal;
use std::sync::OnceLock;

use millstream_schemas::trace::is_valid;
pub use opentelemetry::KeyValue;
pub use opentelemetry::metrics::Counter;
use opentelemetry::metrics::Meter;
use opentelemetry::trace::{Link, SpanContext, SpanKind, TraceState};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{Context, SpanId, TraceFlags, TraceId};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::{SamplingResult, SdkTracerProvider, ShouldSample};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const METRICS: &str = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT";

/// Flushes traces and metrics when dropped.
#[must_use]
pub struct Guard {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let flushed = [
            ("traces", self.traces.take().map(|provider| provider.shutdown())),
            ("metrics", self.metrics.take().map(|provider| provider.shutdown())),
        ];
        for (what, result) in flushed {
            if let Some(Err(error)) = result {
                eprintln!("{what} were not flushed: {error}");
            }
        }
    }
}

/// Sets up logs, traces and metrics for the process; call once, in `main`.
pub fn init(service: &'static str) -> Guard {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,async_nats=warn"));
    let text = match std::env::var("MILLSTREAM_LOG_FORMAT").as_deref() {
        Ok("text") => true,
        Ok("json") => false,
        _ => std::io::stderr().is_terminal(),
    };
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(!text);
    let log = if text {
        let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        log.with_ansi(ansi).compact().boxed()
    } else {
        log.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    };
    let provider = tracer_provider(service);
    let traces = provider.as_ref().map(|provider| {
        // Spans are exported at info and above whatever the log filter says of events.
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("millstream"))
            .with_filter(tracing_subscriber::filter::LevelFilter::INFO)
    });
    tracing_subscriber::registry().with(log.with_filter(filter)).with(traces).init();
    let metrics = meter_provider(service);
    if let Some(provider) = &metrics {
        opentelemetry::global::set_meter_provider(provider.clone());
    }
    Guard { traces: provider, metrics }
}

/// Makes this process's instruments; without effect where metrics are off.
pub fn meter() -> Meter {
    opentelemetry::global::meter("millstream")
}

/// Whether traces or metrics are to be exported.
pub fn is_configured() -> bool {
    [TRACES, METRICS].into_iter().any(has_endpoint)
}

/// Whether a signal has an endpoint; `own` is the variable of that signal alone.
fn has_endpoint(own: &str) -> bool {
    ["OTEL_EXPORTER_OTLP_ENDPOINT", own]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Builds an exporter of a signal, in a thread of its own: the blocking HTTP client refuses to be built inside an async
/// runtime's.
fn exporter<T: Send + 'static>(
    signal: &str,
    build: impl FnOnce() -> Result<T, opentelemetry_otlp::ExporterBuildError> + Send + 'static,
) -> Option<T> {
    match std::thread::spawn(build).join().ok()? {
        Ok(exporter) => Some(exporter),
        Err(error) => {
            eprintln!("{signal} are off: {error}");
            None
        }
    }
}

/// Tells this process from all others, in traces and metrics alike.
static INSTANCE: OnceLock<String> = OnceLock::new();

fn resource(service: &'static str) -> Resource {
    // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the default name.
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(format!("millstream-{service}"));
    }
    let given = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let default = |name: &'static str, value: String| {
        let is_given = given.split(',').any(|pair| pair.split('=').next().is_some_and(|key| key.trim() == name));
        (!is_given).then(|| KeyValue::new(name, value))
    };
    // Two processes of one service are two sources of metrics.
    let instance = INSTANCE.get_or_init(|| format!("{:032x}", rand::random::<u128>())).clone();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let attributes = [default("service.instance.id", instance), default("service.version", version)];
    resource.with_attributes(attributes.into_iter().flatten()).build()
}

fn meter_provider(service: &'static str) -> Option<SdkMeterProvider> {
    if !has_endpoint(METRICS) {
        return None;
    }
    let exporter = exporter("metrics", || opentelemetry_otlp::MetricExporter::builder().with_http().build())?;
    Some(SdkMeterProvider::builder().with_periodic_exporter(exporter).with_resource(resource(service)).build())
}

fn tracer_provider(service: &'static str) -> Option<SdkTracerProvider> {
    if !has_endpoint(TRACES) {
        return None;
    }
    let exporter = exporter("traces", || opentelemetry_otlp::SpanExporter::builder().with_http().build())?;
    let sampler = Impartial(opentelemetry_sdk::trace::Config::default().sampler);
    Some(
        SdkTracerProvider::builder()
            .with_sampler(sampler)
            .with_batch_exporter(exporter)
            .with_resource(resource(service))
            .build(),
    )
}

/// The W3C `traceparent` of the current span; none where traces are off or the span is not sampled.
pub fn traceparent() -> Option<String> {
    let context = tracing::Span::current().context();
    let span = context.span();
    let span = span.span_context();
    (span.is_valid() && span.is_sampled())
        .then(|| format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8()))
}

/// Makes `span` a child of the remote span that `traceparent` names. Malformed text is ignored: it is a hint.
pub fn set_parent(span: &tracing::Span, traceparent: Option<&str>) {
    if let Some(remote) = traceparent.and_then(parse) {
        // An error means that no trace layer is there to take it.
        let _ = span.set_parent(Context::new().with_remote_span_context(remote));
    }
}

/// The same for a `traceparent` that a client sent: the span goes on with its trace, but whether it is sampled is decided here, as
/// for a trace that begins here.
pub fn set_client_parent(span: &tracing::Span, traceparent: Option<&str>) {
    if let Some(remote) = traceparent.and_then(parse) {
        let _ = span.set_parent(Context::new().with_remote_span_context(remote).with_value(FromClient));
    }
}

/// A client's `traceparent` without its wish to be sampled, for where no span of ours takes its place.
pub fn unsampled(mut traceparent: String) -> String {
    traceparent.replace_range(traceparent.len().saturating_sub(2).., "00");
    traceparent
}

/// Marks a parent that a client named.
#[derive(Debug)]
struct FromClient;

/// The sampler that the environment asks for (`OTEL_TRACES_SAMPLER`), which is not shown what a client wishes.
#[derive(Clone, Debug)]
struct Impartial(Box<dyn ShouldSample>);

impl ShouldSample for Impartial {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let parent = parent.filter(|parent| parent.get::<FromClient>().is_none());
        self.0.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

fn parse(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-').skip(1).filter(|_| is_valid(traceparent));
    let (trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?);
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_parents_count() {
        let ok = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(parse(ok).is_some_and(|context| context.is_sampled() && context.is_remote()));
        for bad in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            &ok.replace('4', "x"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            &ok[..40],
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_client_does_not_decide_what_is_sampled() {
        use opentelemetry_sdk::trace::Sampler;
        let sampled = |sampler: Sampler, flags: u8, from_client: bool| {
            let id = TraceId::from_hex("4bf92f3577b34da6a3ce929d0e0e4736").unwrap();
            let span = SpanId::from_hex("00f067aa0ba902b7").unwrap();
            let remote = SpanContext::new(id, span, TraceFlags::new(flags), true, TraceState::NONE);
            let mut parent = Context::new().with_remote_span_context(remote);
            if from_client {
                parent = parent.with_value(FromClient);
            }
            let sampler = Impartial(Box::new(Sampler::ParentBased(Box::new(sampler))));
            let result = sampler.should_sample(Some(&parent), id, "submit", &SpanKind::Internal, &[], &[]);
            result.decision == opentelemetry_sdk::trace::SamplingDecision::RecordAndSample
        };
        assert!(!sampled(Sampler::AlwaysOff, 1, true) && sampled(Sampler::AlwaysOff, 1, false));
        assert!(sampled(Sampler::AlwaysOn, 0, true) && !sampled(Sampler::AlwaysOn, 0, false));
        assert_eq!(
            unsampled("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
        );
    }

    #[test]
    fn processes_are_told_apart() {
        let resource = resource("edge");
        let value = |name: &'static str| resource.get(&opentelemetry::Key::new(name)).map(|value| value.to_string());
        assert_eq!(value("service.name").as_deref(), Some("millstream-edge"));
        assert_eq!(value("service.version").as_deref(), Some(env!("CARGO_PKG_VERSION")));
        let instance = value("service.instance.id").expect("each process has one");
        assert_eq!(instance.len(), 32);
    }
}
