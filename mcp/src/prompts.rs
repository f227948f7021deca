//! Prompts: frequent tasks, described with these tools; and completion of arguments.
//!
//! Their text is in prompt_text.rs.

use nido_api::error::{Code, Error, Result};
use nido_api::name::TemplateName;
use nido_api::{NetChoice, VmInfo};
use rmcp::model::{
    ArgumentInfo, CompletionInfo, GetPromptResult, JsonObject, Prompt, PromptArgument, PromptMessage, Reference, Role,
};

use crate::app::App;
use crate::principal::Principal;
use crate::prompt_access::{PromptAccess, access, usual_template, within};
use crate::prompt_text::{self, PromptCalls, PromptVm, RepositoryTests};
use crate::resource_uri::LOGS;
use crate::tools::{self, DEFAULT_NET};

/// The longest argument that is put into a prompt, in bytes.
const ARGUMENT_MAX: usize = 4096;

const DEPLOY_AND_TEST: &str = "deploy_and_test";
const QUICK_SANDBOX: &str = "quick_sandbox";

/// A time to live that stands for any, in seconds.
const DEFAULT_TTL: u64 = 1800;
/// The default time to live of a sandbox.
const TTLS: [&str; 5] = ["10m", "30m", "1h", "4h", "1d"];

/// All prompts.
pub fn list() -> Vec<Prompt> {
    let needed = |name: &str, words: &str| PromptArgument::new(name).with_description(words).with_required(true);
    let free = |name: &str, words: &str| PromptArgument::new(name).with_description(words).with_required(false);
    vec![
        Prompt::new(
            DEPLOY_AND_TEST,
            Some("Fetch a repository into a fresh VM, run its tests there and report"),
            Some(vec![
                needed(
                    "repository",
                    "Address of a git repository, for example https://git.example/app.git; or path of a directory or a tar \
                     archive on this host, below a directory that the server allows",
                ),
                needed("test_command", "The command that runs the tests, for example make test"),
                free("template", "Template of the VM; sandbox if absent"),
                free("report", "What to report; a summary and the failed tests if absent"),
            ]),
        )
        .with_title("Deploy and test"),
        Prompt::new(
            QUICK_SANDBOX,
            Some("Do something in a VM that is thrown away afterwards"),
            Some(vec![
                needed("task", "What is to be done in the VM"),
                free("template", "Template of the VM; sandbox if absent"),
                free("ttl", "How long the VM lives at most, for example 30m; 30m if absent"),
            ]),
        )
        .with_title("Quick sandbox"),
    ]
}

/// Those that can be followed here by this caller.
pub fn offered(app: &App, principal: &Principal) -> Vec<Prompt> {
    let limits = app.limits(principal);
    let Ok(template) = usual_template(&limits) else { return Vec::new() };
    let offered = |prompt: &Prompt| vm_of(app, principal, &prompt.name, template.as_str(), DEFAULT_TTL).is_ok();
    list().into_iter().filter(offered).collect()
}

/// What can be done in the VM of a prompt, and that VM within the caller's limits.
fn vm_of(
    app: &App,
    principal: &Principal,
    prompt: &str,
    template: &str,
    ttl_seconds: u64,
) -> Result<(PromptAccess, PromptVm)> {
    let name = template.parse::<TemplateName>().map_err(|error| invalid(format!("template: {error}")))?;
    let access = access(app, principal, &name);
    let access = access.filter(|access| prompt != DEPLOY_AND_TEST || access.shell).ok_or_else(|| {
        let words = format!("this server does not offer {prompt}: it does not allow all of the calls that it takes");
        Error::new(Code::Denied, words)
    })?;
    // Which hosts a repository and its packages are on is unknown.
    let (word, memory_mib, net) = match prompt {
        DEPLOY_AND_TEST => ("test", Some(prompt_text::TESTS_MEMORY_MIB), NetChoice::Nat),
        _ => ("sandbox", None, DEFAULT_NET),
    };
    let vm = PromptVm { name: fresh(word)?, template: template.into(), memory_mib, ttl_seconds, net };
    Ok((access, within(&app.limits(principal), vm)?))
}

/// One, filled in.
pub fn get(app: &App, principal: &Principal, name: &str, arguments: Option<&JsonObject>) -> Result<GetPromptResult> {
    let usual = usual_template(&app.limits(principal))?;
    filled(name, arguments, usual.as_str(), |template, ttl| vm_of(app, principal, name, template, ttl))
}

/// The same wherever it is offered: `vm_of` returns the VM for a template and a time to live, and what can be done in it.
fn filled(
    name: &str,
    arguments: Option<&JsonObject>,
    usual_template: &str,
    vm_of: impl Fn(&str, u64) -> Result<(PromptAccess, PromptVm)>,
) -> Result<GetPromptResult> {
    let prompt = list().into_iter().find(|prompt| prompt.name == name);
    let prompt = prompt.ok_or_else(|| invalid(format!("there is no prompt '{}'", crate::answer::plain(name))))?;
    for (key, _) in arguments.into_iter().flatten() {
        let known = prompt.arguments.iter().flatten().any(|argument| argument.name == *key);
        if !known {
            return Err(invalid(format!("{}: {name} has no such argument", crate::answer::plain(key))));
        }
    }
    let given = |key: &str| text(arguments, key);
    let or = |key: &str, usual: &str| Ok::<_, Error>(given(key)?.unwrap_or_else(|| usual.to_owned()));
    let needed = |key: &str| given(key)?.ok_or_else(|| invalid(format!("{key}: it is missing")));
    let template = or("template", usual_template)?;
    let words = match name {
        DEPLOY_AND_TEST => {
            let (repository, command) = (needed("repository")?, needed("test_command")?);
            let report =
                or("report", "a summary, and for every failed test its name and the lines that show the reason")?;
            let (access, vm) = vm_of(&template, prompt_text::TESTS_TTL_SECONDS)?;
            if prompt_text::is_on_host(&repository) && !access.host_files {
                let words =
                    "repository: no files of this host can be copied here; give the address of a git repository";
                return Err(Error::new(Code::Denied, words));
            }
            let tests = RepositoryTests { repository: &repository, command: &command, report: &report };
            prompt_text::deploy_and_test(&vm, &tests)
        }
        _ => {
            let (task, ttl) = (needed("task")?, ttl_seconds(&or("ttl", "30m")?)?);
            let (access, vm) = vm_of(&template, ttl)?;
            let PromptAccess { shell, upload, download, .. } = access;
            prompt_text::quick_sandbox(&vm, &task, PromptCalls { shell, upload, download })
        }
    };
    let result = GetPromptResult::new(vec![PromptMessage::new_text(Role::User, words)]);
    Ok(result.with_description(prompt.description.unwrap_or_default()))
}

/// An unused VM name: every call in a prompt can be made as it is.
fn fresh(word: &str) -> Result<String> {
    let id = nido_files::random::id()?;
    Ok(format!("{word}-{}", id.get(..6).unwrap_or_default()))
}

fn text(arguments: Option<&JsonObject>, key: &str) -> Result<Option<String>> {
    let Some(value) = arguments.and_then(|arguments| arguments.get(key)) else { return Ok(None) };
    let text = value.as_str().ok_or_else(|| invalid(format!("{key}: it is text")))?;
    if text.len() > ARGUMENT_MAX {
        return Err(invalid(format!("{key}: it is longer than {ARGUMENT_MAX} bytes")));
    }
    let text = nido_api::sanitize::for_reader(text.as_bytes(), ARGUMENT_MAX).text;
    Ok(Some(text).filter(|text| !text.trim().is_empty()))
}

/// `30m` in seconds.
fn ttl_seconds(text: &str) -> Result<u64> {
    let wrong = || invalid(format!("ttl: '{}' is not a time such as 30m or 2h", crate::answer::plain(text)));
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).filter(|seconds| *seconds > 0).ok_or_else(wrong)
}

fn invalid(words: String) -> Error {
    Error::new(Code::SpecInvalid, words)
}

/// What an argument may be, as far as it is written already.
pub async fn complete(
    app: &App,
    principal: &Principal,
    of: &Reference,
    argument: &ArgumentInfo,
) -> Result<CompletionInfo> {
    let nido = app.nido().await?;
    let may = |tool: &str| tools::is_offered(tool, app.settings(), principal);
    let choices: Vec<String> = match (of, argument.name.as_str()) {
        (Reference::Resource(resource), "name") if resource.uri == LOGS && may("vm_ls") => {
            nido.list()?.vms.iter().map(|vm: &VmInfo| vm.name.to_string()).collect()
        }
        (Reference::Prompt(_), "template") if may("template_list") => {
            let allowed = app.limits(principal).templates;
            let may_use = |name: &TemplateName| allowed.as_ref().is_none_or(|allowed| allowed.contains(name));
            let names = nido.template_list()?.templates.into_iter().map(|template| template.name);
            names.filter(may_use).map(|name| name.to_string()).collect()
        }
        (Reference::Prompt(prompt), "ttl") if prompt.name == QUICK_SANDBOX => TTLS.map(str::to_owned).to_vec(),
        (Reference::Prompt(prompt), "test_command") if prompt.name == DEPLOY_AND_TEST => {
            ["make test", "cargo test", "npm test", "pytest", "go test ./..."].map(str::to_owned).to_vec()
        }
        _ => Vec::new(),
    };
    let mut fitting: Vec<_> = choices.into_iter().filter(|choice| choice.starts_with(&argument.value)).collect();
    let total = u32::try_from(fitting.len()).unwrap_or(u32::MAX);
    let more = fitting.len() > CompletionInfo::MAX_VALUES;
    fitting.truncate(CompletionInfo::MAX_VALUES);
    CompletionInfo::with_pagination(fitting, Some(total), more).map_err(Error::internal)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fill(name: &str, arguments: serde_json::Value) -> Result<String> {
        let serde_json::Value::Object(arguments) = arguments else { panic!("{arguments}") };
        let access = PromptAccess { shell: true, upload: true, host_files: false, download: true };
        let vm = |template: &str, ttl_seconds| {
            template.parse::<TemplateName>().map_err(|error| invalid(format!("template: {error}")))?;
            let (name, template) = (fresh("sandbox")?, template.to_owned());
            Ok((access, PromptVm { name, template, memory_mib: None, ttl_seconds, net: DEFAULT_NET }))
        };
        let result = filled(name, Some(&arguments), "sandbox", vm)?;
        Ok(serde_json::to_string(&result.messages).unwrap())
    }

    #[test]
    fn arguments_are_filled_in_and_each_vm_has_its_own_name() {
        let sandbox = || fill(QUICK_SANDBOX, json!({"task": "x", "ttl": "2h"})).unwrap();
        let words = sandbox();
        assert!(words.contains(r#"\"ttl_seconds\":7200"#) && words.contains("<task>x</task>"), "{words}");
        assert_ne!(words, sandbox());
        let tests = json!({"repository": "https://a/b", "test_command": "make test", "report": "only the exit code"});
        let words = fill(DEPLOY_AND_TEST, tests).unwrap();
        let path = json!({"repository": "/srv/app", "test_command": "make test"});
        assert_eq!(fill(DEPLOY_AND_TEST, path).unwrap_err().code(), Code::Denied, "no host files here");
        assert!(words.contains("https://a/b") && words.contains("<report>only the exit code</report>"), "{words}");
    }

    #[test]
    fn errors_name_the_argument() {
        let wrong = |name: &str, arguments| fill(name, arguments).unwrap_err().to_string();
        assert!(wrong(QUICK_SANDBOX, json!({})).starts_with("task: "));
        assert!(wrong(QUICK_SANDBOX, json!({"task": "x", "ttl": "soon"})).starts_with("ttl: "));
        assert!(wrong(QUICK_SANDBOX, json!({"task": "x", "colour": "red"})).starts_with("colour: "));
        assert!(wrong(QUICK_SANDBOX, json!({"task": "x", "template": "No"})).starts_with("template: "));
        assert!(wrong("dance", json!({})).contains("no prompt"));
        assert_eq!(ttl_seconds("2h").unwrap(), 7_200);
        for bad in ["", "m", "0m", "-1m", "1.5h", "1µ", "99999999999999999999d"] {
            assert!(ttl_seconds(bad).is_err(), "{bad}");
        }
    }
}
