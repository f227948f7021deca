//! The description of the API, made of the routes and the core's own types, with what holds for every route added once.

use std::sync::OnceLock;

use nido_vmm::error::{Code, Problem};
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, PathItem, Ref, RefOr, Response,
    ResponseBuilder, SecurityRequirement,
};
use utoipa::{PartialSchema, ToSchema};

use super::operations::Operation as Pending;
use super::routes;

/// What each noun is about.
const TAGS: [(&str, &str); 10] = [
    ("vms", "Virtual machines, from being made to being forgotten."),
    ("exec", "Commands in a VM."),
    ("files", "Files of a VM, streamed."),
    ("snapshots", "A VM as it was at one moment."),
    ("forwards", "Ports of a guest published on the host."),
    ("templates", "What VMs are made from."),
    ("pools", "Clones that wait."),
    ("webhooks", "Endpoints that are told of events."),
    ("events", "What happened, and what happens."),
    ("operations", "What goes on, for requests with `Prefer: respond-async`."),
];

/// The operations that are answered with 202 if that is preferred.
const MAY_WAIT: [&str; 13] = [
    "vm_spawn",
    "vm_delete",
    "vm_start",
    "vm_stop",
    "vm_restart",
    "vm_fork",
    "vm_exec",
    "run",
    "snapshot_create",
    "snapshot_restore",
    "template_create",
    "template_build",
    "template_bake",
];

const ABOUT: &str = "Throw-away virtual machines on this host. Every error is a problem (RFC 9457) with a stable `code` \
and mostly a `hint`. Requests that change something go to their end even if the caller hangs up; with \
`Prefer: respond-async` they are answered at once with 202 and an operation to poll and to cancel.";

/// As it is served and kept in the repository.
pub fn text() -> String {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| describe().to_pretty_json().unwrap_or_default() + "\n").clone()
}

fn describe() -> OpenApi {
    let mut api = routes::described().into_openapi();
    api.info = InfoBuilder::new()
        .title("nido")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(ABOUT))
        .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build()))
        .build();
    let tags = TAGS.map(|(name, about)| TagBuilder::new().name(name).description(Some(about)).build());
    api.tags = Some(tags.to_vec());
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    let mut components = api.components.take().unwrap_or_else(|| ComponentsBuilder::new().build());
    components.schemas.insert(Problem::name().into_owned(), Problem::schema());
    components.schemas.insert(Pending::name().into_owned(), Pending::schema());
    let mut statuses: Vec<u16> = Code::ALL.iter().map(|code| code.status()).collect();
    statuses.sort_unstable();
    statuses.dedup();
    for status in &statuses {
        components.responses.insert(status.to_string(), RefOr::T(problem(*status)));
    }
    components.add_security_scheme("token", bearer);
    api.components = Some(components);
    api.security = Some(vec![SecurityRequirement::new("token", [""; 0])]);
    for operation in api.paths.paths.values_mut().flat_map(operations) {
        for status in statuses.iter().map(u16::to_string) {
            let reference = Ref::from_response_name(&status);
            operation.responses.responses.entry(status).or_insert(RefOr::Ref(reference));
        }
        if operation.operation_id.as_deref().is_some_and(|id| MAY_WAIT.contains(&id)) {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(Pending::name()))).build();
            let location = HeaderBuilder::new().description(Some("The operation.")).build();
            let accepted = ResponseBuilder::new()
                .description("It goes on: an operation to poll, for requests with `Prefer: respond-async`.")
                .content("application/json", content)
                .header("Location", location)
                .build();
            operation.responses.responses.insert("202".into(), RefOr::T(accepted));
            let prefer = ParameterBuilder::new()
                .name("Prefer")
                .parameter_in(ParameterIn::Header)
                .description(Some("`respond-async`: answer at once with an operation."))
                .schema(Some(String::schema()))
                .build();
            operation.parameters.get_or_insert_default().push(RefOr::T(prefer));
        }
    }
    api
}

/// What of a status is common to all routes.
fn problem(status: u16) -> Response {
    let slugs: Vec<_> = Code::ALL.iter().filter(|code| code.status() == status).map(|code| code.slug()).collect();
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name()))).build();
    ResponseBuilder::new().description(slugs.join(", ")).content("application/problem+json", content).build()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().filter_map(Option::as_mut)
}
