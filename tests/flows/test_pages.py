"""MLflow's and Prefect's pages of a training, in a real browser, as a reviewer sees them.

Each test leaves a screenshot in `SCREENSHOTS`, or in pytest's temporary folder.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from prefect import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

from flows.deployments import DEPLOYMENTS, deploy
from flows.summary import Summary
from infra.tracking.client import page_url
from infra.tracking.mlflow_runs import run_url
from tasks.config.run import RunConfig

pytestmark = pytest.mark.ui

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
PATIENCE = 30_000  # milliseconds until a page has what is looked for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser: install Debian's package chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


@pytest.fixture(scope="module")
def screenshot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Page, str], None]:
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))

    def take(page: Page, name: str) -> None:
        page.wait_for_timeout(1500)  # charts move while they appear
        page.screenshot(path=folder / f"{name}.png")

    return take


@pytest.mark.parametrize("width", [1280, 1920])
def test_first_visitor_sees_accuracy_and_verdict_of_all_runs(
    trained: Summary, page: Page, screenshot: Callable[[Page, str], None], width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(trained.mlflow_runs_url or "")
    expect(page.get_by_text("Model registry").first).to_be_visible()  # only for model training
    columns = ["test/accuracy", "val/accuracy", "convoy.verdict"]
    if width == 1920:
        columns += ["convoy.model_version", "Dataset", "train/images_per_second", "User"]
    for name in columns:
        expect(page.locator(".ag-header-cell", has_text=name).first).to_be_in_viewport()
    expect(page.locator(".ag-cell", has_text="passed").first).to_be_in_viewport()
    screenshot(page, f"mlflow-runs-{width}")


def test_run_says_in_words_how_it_went(trained: Summary, page: Page, screenshot: Callable[[Page, str], None]) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(trained.mlflow_run_url or "")
    expect(page.get_by_text("Model registry").first).to_be_visible()
    expect(page.get_by_text(f"{trained.accuracy:.2%} test accuracy, passed").first).to_be_in_viewport()
    expect(page.get_by_text(f"{trained.accuracy:.2%} of ").first).to_be_visible()
    expect(page.get_by_text("quality gate: passed").first).to_be_visible()
    expect(page.get_by_text("hardest classes").first).to_be_visible()
    screenshot(page, "mlflow-run")


def test_run_has_its_charts_in_groups(trained: Summary, page: Page, screenshot: Callable[[Page, str], None]) -> None:
    page.goto(run_url(trained.mlflow_run_id or "", "model-metrics"))
    expect(page.locator("svg.main-svg").first).to_be_visible()
    screenshot(page, "mlflow-charts")
    sections = re.findall(r"(?m)^(\w+)\s*\(\d+\)", page.locator("body").inner_text())
    wanted = ["accuracy", "test", "train", "val", "work"]
    assert [name for name in sections if name in wanted] == wanted, sections


def test_report_opens_inside_mlflow(trained: Summary, page: Page, screenshot: Callable[[Page, str], None]) -> None:
    page.goto(run_url(trained.mlflow_run_id or "", "artifacts/report/index.html"))
    report = page.frame_locator("iframe").first
    for heading in ("Verdict", "Evaluation", "Serving", "Data"):
        expect(report.get_by_role("heading", name=heading, exact=True)).to_be_attached()
    for picture in report.get_by_role("img").all():
        assert picture.evaluate("image => image.naturalWidth") > 300
    screenshot(page, "mlflow-report")


def test_report_is_whole_by_itself(
    trained: Summary, browser: Browser, tmp_path: Path, screenshot: Callable[[Page, str], None]
) -> None:
    from mlflow.artifacts import download_artifacts

    file = download_artifacts(run_id=trained.mlflow_run_id, artifact_path="report/index.html", dst_path=str(tmp_path))
    offline = browser.new_page(viewport={"width": 1200, "height": 4000}, java_script_enabled=False)
    offline.route("http**", lambda route: pytest.fail(f"the page asks for {route.request.url}"))
    offline.goto(Path(file).as_uri())
    expect(offline.get_by_text("Passed", exact=False).first).to_be_visible()
    assert offline.get_by_role("img").count() == 4
    screenshot(offline, "report")
    offline.set_viewport_size({"width": 1280, "height": 800})
    for name in ("Accuracy", "Verdict", "Against the champion", "Data"):
        tile = offline.locator(".tiles section").filter(has=offline.get_by_text(name, exact=True))
        box = tile.bounding_box()
        assert box is not None and box["y"] + box["height"] < 800, f"{name} is not on the first screen"
    expect(offline.get_by_text("There was no champion")).to_be_visible()
    offline.emulate_media(media="print")
    assert offline.locator(".tiles section").first.evaluate("tile => getComputedStyle(tile).breakInside") == "avoid"
    assert offline.pdf().startswith(b"%PDF")
    offline.close()


def test_version_has_its_card(trained: Summary, page: Page, screenshot: Callable[[Page, str], None]) -> None:
    page.goto(page_url(f"models/{trained.model_name}/versions/{trained.model_version}"))
    expect(page.get_by_text(f"{trained.accuracy:.2%} of ").first).to_be_in_viewport()
    expect(page.get_by_role("heading", name=f"{trained.model_name}, version {trained.model_version}")).to_be_visible()
    expect(page.get_by_text("Intended use").first).to_be_visible()
    expect(page.get_by_text("convoy.verdict_summary").first).to_be_attached()
    screenshot(page, "mlflow-version")


@pytest.mark.parametrize("model", ["resnet18", "nets.small:Small"])
def test_the_form_of_a_training_starts_what_a_person_fills_in(
    stack: object, quiet_prefect: None, page: Page, screenshot: Callable[[Page, str], None], model: str
) -> None:
    """No worker takes the flow run, so that it can be looked at."""
    list(deploy(DEPLOYMENTS))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/any-dataset")
    page.goto(f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/deployments/deployment/{deployment.id}/run")

    def field(name: str) -> Locator:
        return page.locator(".p-label", has=page.get_by_text(f"{name} (Optional)", exact=True)).last

    places = []
    for name in ("Dataset", "Name", "Model", "Epochs"):
        expect(field(name)).to_be_visible()
        places.append((field(name).bounding_box() or {})["y"])
    assert places == sorted(places) and places[-1] < 1000, "they are not the first four"
    field("Dataset").locator("textarea").fill("digits")
    field("Name").locator("textarea").fill("by-form")
    if ":" in model:
        page.get_by_text("Your own", exact=True).click()
        field("Model").locator("textarea").fill(model)
    else:  # the list of names is there at once
        field("Model").locator("[class*=select]").last.click()
        page.get_by_text(model, exact=True).last.click()
    field("Epochs").locator("input").fill("3")
    expect(page.get_by_text("Pretrained Sha256")).to_have_count(0)
    screenshot(page, f"prefect-form-{model.partition(':')[0]}")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/deployments/deployment/*?tab=Runs")

    with get_client(sync_client=True) as client:
        of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        (run,) = client.read_flow_runs(deployment_filter=of_it)
        client.delete_flow_run(run.id)
    assert run.parameters.keys() == {"config", "refresh"}
    wanted = RunConfig.model_validate({"dataset": "digits", "name": "by-form", "model": model, "epochs": 3})
    assert RunConfig.model_validate(run.parameters["config"]) == wanted
    assert not wanted.augment.flip  # of digits; the form has not asked for it


def test_model_begins_with_the_result_of_its_champion(
    trained: Summary, page: Page, screenshot: Callable[[Page, str], None]
) -> None:
    page.goto(page_url(f"models/{trained.model_name}"))
    expect(page.get_by_text("test accuracy, passed: version").first).to_be_in_viewport()
    screenshot(page, "mlflow-model")


def test_flow_run_shows_its_steps_and_pages(
    trained: Summary, page: Page, screenshot: Callable[[Page, str], None]
) -> None:
    page.goto(trained.prefect_flow_run_url or "")
    expect(page.get_by_text("Completed").first).to_be_visible()
    expect(page.get_by_text(f"{trained.model_name} convoy9 (").first).to_be_visible()
    page.wait_for_timeout(4000)  # the graph is drawn on a canvas: only the picture shows it
    screenshot(page, "prefect-run")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).last.click()
    for key in ("evaluation", "quality-gate", "serving-gate", "data-gate", "result"):
        expect(page.get_by_text(key, exact=True).first).to_be_visible()
    screenshot(page, "prefect-artifacts")
